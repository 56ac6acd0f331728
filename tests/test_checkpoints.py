"""What several processes do with a checkpoint that one of them cannot read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax import checkpoints
from dmd_jax.errors import UserError
from dmd_jax.sharding import make_mesh, replicated, with_shardings


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
