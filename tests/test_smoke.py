from fedsim import simulate


def test_run(settings):
    p = simulate.run(settings())
    assert (p / "scores.json").exists()


import pytest


@pytest.mark.parametrize("a", ["llama", "qwen3", "mistral", "gemma2", "phi3"])
def test_arch(settings, a):
    simulate.run(settings(a))
