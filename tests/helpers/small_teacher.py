"""The commands with the tests' own network in place of the teacher's: it compiles in a second."""

import sys

import small

from dmd_jax.commands.cli import main
from dmd_jax.distillation import teaching
from dmd_jax.method.denoisers import Denoiser
from dmd_jax.method.schedules import NoiseSchedule

small.SHAPE, small.CLASSES = (8, 8, 1), 10  # the digits'


def build(network, **options):
    # Made when it is asked for: processes join before JAX computes anything.
    return Denoiser(small.init, small.denoise, small.SHAPE, small.CLASSES, NoiseSchedule.edm())


if __name__ == "__main__":
    teaching.build_denoiser = build
    sys.exit(main(sys.argv[1:]))
