"""Checkpoints that cannot be read, by one process or by all, or that are not what was saved."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax.errors import UserError
from dmd_jax.objectives.optimizers import AdamW, adamw
from dmd_jax.parallel.sharding import make_mesh, replicated, with_shardings
from dmd_jax.storage import checkpoints
from dmd_jax.training.state import WITHOUT_PLAYERS, former_layout, train_state


def test_what_another_process_cannot_read_is_not_used_here(tmp_path, monkeypatch, caplog):
    mesh = make_mesh()
    sharding = replicated(mesh)
    state = {"params": jax.device_put(jnp.arange(4.0), sharding)}
    abstract = with_shardings(state, {"params": sharding})
    run = checkpoints.Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2):
        run.save(step, {"params": state["params"] + step}, {"batches": step})
    run.wait()
    problems = iter(["its part is torn"])

    def settle(value, judge):
        # Of two processes; both have the same steps, and the other fails at the first it reads.
        other = value if isinstance(value, list) else next(problems, None)
        return judge([value, other])

    monkeypatch.setattr(checkpoints, "settle", settle)
    step, restored, position = run.restore(abstract)
    assert (step, position) == (1, {"batches": 1})
    np.testing.assert_array_equal(restored["params"], np.arange(4.0) + 1)
    assert "2 is not whole (its part is torn); falling back" in caplog.text
    assert (tmp_path / "checkpoints" / "broken-2").is_dir()
    assert run.steps == [1]
    monkeypatch.setattr(
        checkpoints, "settle", lambda value, judge: judge([value, value or "torn as well"])
    )
    with pytest.raises(UserError, match=r"no whole checkpoint in .*: steps \[1\] cannot be read"):
        run.restore(abstract)


@pytest.fixture
def two_steps(tmp_path):
    """A folder with the checkpoints of steps 1 and 2, and the state to restore."""
    sharding = replicated(make_mesh())
    params = jax.device_put(jnp.arange(4.0), sharding)
    run = checkpoints.Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2):
        state = {"ema": {"w": params + step}, "step": jax.device_put(jnp.int32(step), sharding)}
        run.save(step, state, {"batches": step})
    run.close()
    return run.folder, with_shardings(state, jax.tree.map(lambda _: sharding, state))


def test_leaves_that_are_not_those_saved_are_not_gone_on_with(two_steps, caplog):
    folder, abstract = two_steps
    # Whole files, but those of another step: no parser can see it.
    shutil.rmtree(folder / "2" / "state")
    shutil.copytree(folder / "1" / "state", folder / "2" / "state")
    step, name, params = checkpoints.restore_subtree(folder, ["ema"])
    assert (step, name) == (1, "ema")
    np.testing.assert_array_equal(params["w"], np.arange(4.0) + 1)
    assert "2 is not whole (ema/w was changed since it was saved)" in caplog.text
    step, state, position = checkpoints.Checkpoints(folder).restore(abstract)
    assert (step, int(state["step"]), position) == (1, 1, {"batches": 1})
    assert "2 is not whole (ema/w and 1 more were changed since it was saved)" in caplog.text
    assert (folder / "broken-2").is_dir()


def test_a_position_that_is_not_the_one_saved_is_not_gone_on_with(two_steps, caplog):
    folder, abstract = two_steps
    path = folder / "2" / "position" / "metadata"
    path.write_text(path.read_text().replace('"batches": 2', '"batches": 3'))
    assert checkpoints.restore_subtree(folder, ["ema"])[0] == 1
    assert checkpoints.Checkpoints(folder).restore(abstract)[0] == 1
    assert "2 is not whole (it was changed since it was written" in caplog.text


def test_checkpoints_without_digests_are_read_and_told_of(two_steps, caplog):
    folder, abstract = two_steps
    (folder / "2" / "position" / "metadata").write_text(json.dumps({"batches": 2}))
    step, state, position = checkpoints.Checkpoints(folder).restore(abstract)
    assert (step, int(state["step"]), position) == (2, 2, {"batches": 2})
    assert "2 has no digests to check" in caplog.text
    assert checkpoints.restore_subtree(folder, ["ema"])[0] == 2


def test_a_position_that_changes_after_saving_is_written_as_it_was(tmp_path):
    sharding = replicated(make_mesh())
    state = {"w": jax.device_put(jnp.zeros(3), sharding)}
    run, position = checkpoints.Checkpoints(tmp_path / "checkpoints"), {"pending": [[1, 2.0]]}
    run.save(1, state, position)
    position["pending"].append((2, state["w"]))
    run.wait()
    abstract = with_shardings(state, {"w": sharding})
    assert run.restore(abstract)[2] == {"pending": [[1, 2.0]]}


def test_a_checkpoint_that_knows_no_players_is_the_state(tmp_path):
    """As runs wrote them that had two networks and the generator's average by name."""
    sharding = replicated(make_mesh())
    params = {"generator": {"w": jnp.arange(3.0)}, "fake_score": {"w": jnp.ones(2)}}
    optimizers = dict.fromkeys(params, adamw(AdamW(learning_rate=1e-3)).transformation)
    state = train_state(params, optimizers, averaged=["generator"], seed=4)
    state = jax.device_put(state, sharding)
    run = checkpoints.Checkpoints(tmp_path / "checkpoints")
    run.save(1, former_layout(state), {"batches": 1})
    run.close()
    abstract = with_shardings(state, jax.tree.map(lambda _: sharding, state))
    step, found, position = checkpoints.Checkpoints(run.folder).restore(abstract, WITHOUT_PLAYERS)
    assert (step, position) == (1, {"batches": 1})
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    without_average = train_state(params, optimizers, seed=4)
    with pytest.raises(UserError, match="ema/w is not expected"):
        checkpoints.Checkpoints(run.folder).restore(
            with_shardings(without_average, jax.tree.map(lambda _: sharding, without_average)),
            WITHOUT_PLAYERS,
        )
