"""The commands with the tests' own network in place of the teacher's: it compiles in a second."""

import sys

import small

from dmd_jax.commands import teacher
from dmd_jax.commands.cli import main

small.SHAPE, small.CLASSES = (8, 8, 1), 10  # the digits'


class Small:
    """What teacher.build_denoiser gives."""

    sample_shape, num_classes, cond_shape = small.SHAPE, small.CLASSES, None
    init = staticmethod(small.init)
    denoise = staticmethod(small.denoise)


if __name__ == "__main__":
    teacher.build_denoiser = lambda network, **options: Small
    sys.exit(main(sys.argv[1:]))
