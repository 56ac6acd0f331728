"""Families of teachers, one file each."""

from dmd_jax.teachers.edm import edm_teacher
from dmd_jax.teachers.stable_diffusion import stable_diffusion_teacher
from dmd_jax.teachers.teacher import Frozen, Teacher, Tokens

__all__ = ["Frozen", "Teacher", "Tokens", "edm_teacher", "stable_diffusion_teacher"]
