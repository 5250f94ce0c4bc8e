import pytest
import torch

from services.trainer.torch_device import device_words, repeatable, torch_device
from shared.pipeline.errors import FractureSweepError

pytestmark = pytest.mark.trainer


def test_cuda_without_cuda_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(FractureSweepError, match=r"network\.device is cuda, but torch .* finds no CUDA device"):
        torch_device("cuda")


@pytest.mark.parametrize(("there", "device"), [(False, "cpu"), (True, "cuda")])
def test_auto_is_cuda_where_there_is_one(there: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)

    assert torch_device("auto").type == device
    assert torch_device("cpu").type == "cpu"


def test_the_words_of_the_processor_are_cpu() -> None:
    assert device_words(torch.device("cpu")) == "cpu"


def test_what_makes_torch_repeat_is_put_back_even_after_an_error() -> None:
    threads = torch.get_num_threads()
    inside: tuple[bool, int] | None = None

    def interrupted() -> None:
        nonlocal inside
        with repeatable(threads=1):
            inside = (torch.are_deterministic_algorithms_enabled(), torch.get_num_threads())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    assert inside == (True, 1)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == threads
