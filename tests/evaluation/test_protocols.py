"""Protocols: what each sets, and how flags that override one are named."""

import argparse

import pytest

from dmd_jax.evaluation.protocols import PROTOCOLS, add_protocol_arguments, protocol_of


def protocol(*arguments):
    parser = argparse.ArgumentParser()
    add_protocol_arguments(parser)
    return protocol_of(parser.parse_args(arguments))


@pytest.mark.parametrize(
    ("name", "conventions"),
    [
        # As the authors' released code has them.
        ("edm", ("tensorflow", "edm", "uniform", "")),
        ("dmd2", ("tensorflow", "dmd2", "balanced", "A photo depicts ")),
        ("clean-fid", ("clean", "dmd2", "uniform", "A photo depicts ")),
        ("pytorch-fid", ("pytorch_fid", "edm", "uniform", "")),
    ],
)
def test_what_a_protocol_sets(name, conventions):
    found = protocol("--protocol", name)
    assert found.conventions == conventions and str(found) == name
    preprocessing, rule, labels, prefix = conventions
    common = {"name": name, "preprocessing": preprocessing, "bytes": rule, "overridden": []}
    assert found.results(captions=False) == common | {"labels": labels}
    assert found.results(captions=True) == common | {"clip_prefix": prefix}


def test_the_default_has_a_name():
    assert str(protocol()) == "pytorch-fid"
    assert protocol().conventions == PROTOCOLS["pytorch-fid"]


def test_flags_override_and_are_named():
    found = protocol(
        "--protocol", "dmd2", "--bytes", "edm", "--clip-prefix", "", "--labels", "balanced"
    )
    assert found.conventions == ("tensorflow", "edm", "balanced", "")
    assert found.overridden == ("bytes", "clip_prefix")  # --labels says what the protocol does
    assert str(found) == "dmd2 but for --bytes 'edm', --clip-prefix ''"
    assert found.results(captions=True)["overridden"] == ["bytes", "clip_prefix"]
    assert str(protocol("--inception-preprocessing", "tensorflow")) == (
        "pytorch-fid but for --inception-preprocessing 'tensorflow'"
    )
