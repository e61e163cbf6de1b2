"""What is read from a call's inputs."""

from typing import Any

import pytest
import torch

from chipmunk_fx.graph.inputs import Roles
from chipmunk_fx.runtime import observe
from chipmunk_fx.runtime.observe import Observer, fingerprint
from tests.runtime.models import noise, words

ROLES = Roles(timestep=0, latents=1, text=(2,), ids=())


def seen(timestep=None, latents=None, text=None, roles=ROLES, observer=None) -> Any:
    values = [torch.tensor([900.0]) if timestep is None else timestep]
    values += [noise() if latents is None else latents, words() if text is None else text]
    return (observer or Observer()).observe(roles, values).whole()


def test_a_timestep_is_a_number_a_sample():
    assert seen(torch.tensor([900.0])).timestep == (900.0,)
    assert seen(torch.tensor(900)).timestep == (900.0,)
    assert seen(torch.tensor([900, 800], dtype=torch.int64)).timestep == (900.0, 800.0)
    assert seen(roles=Roles(None, 1, (2,), ())).timestep is None


def test_a_timestep_for_every_token_is_summed_up():
    times = torch.linspace(0, 1, 1000)
    assert len(seen(times).timestep) == 3
    assert seen(times).timestep == seen(times.clone()).timestep != seen(times * 0.9).timestep


def test_latents_are_sampled_and_their_shape_is_told():
    first, second = seen(latents=noise(1)), seen(latents=noise(2))
    assert 64 <= len(first.latents) <= 128 and first.latents != second.latents
    assert first.shape == second.shape != seen(latents=noise(1, 24)).shape
    assert first.shape != seen(latents=noise(1).double()).shape
    assert len(seen(latents=torch.ones(1, 2)).latents) == 2


def test_a_sample_of_strided_latents():
    latents = noise(1)
    assert (
        seen(latents=latents.permute(0, 2, 3, 1)).latents
        == seen(latents=latents.permute(0, 2, 3, 1).contiguous()).latents
    )


def test_texts_are_told_by_content():
    assert seen(text=words(1)).text == seen(text=words(1)).text != seen(text=words(2)).text
    assert seen(roles=Roles(0, 1, (), ())).text is None


def test_the_content_of_a_text_is_read_once(monkeypatch: pytest.MonkeyPatch):
    read = []
    monkeypatch.setattr(observe, "fingerprint", lambda tensor: read.append(tensor) or fingerprint(tensor))
    observer, text = Observer(), words(1)
    first = seen(text=text, observer=observer).text
    assert seen(text=text, observer=observer).text == first and len(read) == 1
    text.mul_(2)
    assert seen(text=text, observer=observer).text != first and len(read) == 2
    with torch.inference_mode():
        changing = words(1)
        assert seen(text=changing, observer=observer).text == first
        changing.mul_(2)  # leaves no trace on such a tensor
        assert seen(text=changing, observer=observer).text != first


def test_masks_and_flags_are_read_when_they_are_asked_for():
    roles, observer = Roles(0, 1, (2,), (), rest=(3,)), Observer()

    def rest(mask: Any, graph: object = "a graph") -> Any:
        values = [torch.tensor([900.0]), noise(), words(), mask]
        return observer.observe(roles, values, graph).whole().rest

    assert rest(None, graph=None) is None
    ones = torch.ones(1, 8)
    assert rest(ones)() == rest(ones.clone())() != rest(torch.zeros(1, 8))()
    assert rest(ones, "one graph")() != rest(ones, "another")()
    before = rest(ones)
    ones.zero_()
    assert before() != rest(ones)() == rest(torch.zeros(1, 8))()
    assert rest(torch.ones(1 << 20, 2))() == rest(torch.ones(1 << 20, 2))() != rest(torch.zeros(1 << 20, 2))()
    with torch.inference_mode():  # where nothing tells that it is written to
        mask = torch.ones(1, 8)
        before = rest(mask)
        mask.zero_()
        assert before() != rest(mask)()
    assert rest(2)() != rest(3)()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]
)
def test_fingerprints_of_every_dtype(dtype: torch.dtype):
    text = (words(1) * 3).to(dtype)
    assert fingerprint(text) == fingerprint(text.clone()) == fingerprint(text.mT.contiguous().mT)
    changed = text.clone()
    changed[0, 3, 5] = 0 if changed[0, 3, 5] else 1
    assert fingerprint(changed) != fingerprint(text)


def test_fingerprints_tell_places_and_shapes():
    text = words(1)
    for other in (text.flip(1), text.roll(1, 2), text.reshape(1, 16, 8), text[:, :-1], -text):
        assert fingerprint(other) != fingerprint(text)
    assert fingerprint(torch.view_as_complex(text.reshape(4, 16, 2))) == fingerprint(
        torch.view_as_complex(text.clone().reshape(4, 16, 2))
    )
    assert fingerprint(torch.zeros(0, 4)) == fingerprint(torch.zeros(0, 4))


def moving(*steps: tuple[float, float, int]) -> list[tuple[float, ...]]:
    """The timesteps read of two inputs and of the latents of a seed, call by call."""
    roles, observer = Roles(0, 1, (2,), (), doubtful=(3,)), Observer()
    read = []
    for first, second, seed in steps:
        values = [torch.tensor([first]), noise(seed), words(), torch.tensor([second])]
        read.append(observer.observe(roles, values).whole().timestep)
    return read


def test_of_two_inputs_that_may_be_the_timestep_the_first_to_move_is():
    assert moving((7, 900, 1), (7, 700, 2), (7, 500, 3), (7, 900, 4)) == [(7,), (700,), (500,), (900,)]
    assert moving((900, 7, 1), (700, 7, 2), (900, 8, 3)) == [(900,), (700,), (900,)]
    # another branch of guidance is told by the second: the latents are the same
    assert moving((900, 0, 1), (900, 1, 1), (700, 0, 2), (700, 1, 2)) == [(900,), (900,), (700,), (700,)]
