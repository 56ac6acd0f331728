"""The commands of `dmd-jax`, one file each."""
