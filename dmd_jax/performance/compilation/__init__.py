"""What a compiler says of a program without running it: TPU topologies, memory, time, traffic."""
