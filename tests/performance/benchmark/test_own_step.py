import jax
from commands import TINY
from parity import text_config

from dmd_jax.config import load_config
from dmd_jax.distillation.from_config import mesh_of
from dmd_jax.method.schedules import edm_level
from dmd_jax.models import abstract_params, build_denoiser
from dmd_jax.performance.benchmark.own_step import OwnStep
from dmd_jax.performance.flops import count_flops, model_flops


def test_the_step_goes_on_from_its_own_state():
    config = load_config(str(TINY), ["--config.mesh.fsdp=2"])
    own = OwnStep(config, mesh_of(config))
    own.prepare()
    losses = [float(own()["loss_fake_score"]) for _ in range(3)]
    assert int(own.state.step) == 3
    assert len(set(losses)) == 3
    own.release()
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((own.state, own.frozen, own.batch)))


def test_model_flops_are_of_the_predictions_and_their_gradients():
    config = load_config(str(TINY), [])
    denoiser = build_denoiser(config.network.to_dict())

    def prediction(params, x_t, label):
        return denoiser.denoise(params, x_t, edm_level(jax.numpy.ones(1)), label)

    image = jax.ShapeDtypeStruct((1, *denoiser.sample_shape), jax.numpy.float32)
    label = jax.ShapeDtypeStruct((1,), jax.numpy.int32)
    one = count_flops(prediction, abstract_params(config.network.to_dict()), image, label)
    # Of 16 images three passes of the generator and of the fake score, with a gradient, and one
    # each of the two scores in the matching loss; of 8 pairs three passes more.
    passes = 16 * (3 + 3 + 1 + 1) + 8 * 3
    found = model_flops(config)
    # No gradient of the images is taken, so that a few first layers have only two passes.
    assert 0.9 * passes * one < found < passes * one
    config.accumulation = 2
    assert model_flops(config) == found


def test_what_is_computed_again_for_memory_is_no_model_flops():
    config = text_config(remat="full", batch_size=16, objective={"regression_batch_size": 8})
    again = model_flops(config)
    config.remat = "none"
    assert model_flops(config) == again
