from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as HFTokenizer

from jaxmoe import LLM, RequestError, SamplingParams
from jaxmoe.engine.runner import bucket
from jaxmoe.text.tokenizer import CheckpointTokenizer

from ..conftest import ONE_DEVICE, mesh_of

CASE = "qwen3_moe_norm"
MESH = "data=2,tensor=2,expert=2"
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5, 8], [9, 7, 9, 3, 2], [3, 8, 4, 6, 2]]


def random_params(seed: int, tokens: int = 12) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=1.0, top_p=0.9, seed=seed, ignore_eos=True)


@pytest.mark.parametrize("mesh", [ONE_DEVICE, MESH])
def test_no_neighbor_changes_an_output(mesh, tiny_llm):
    llm = tiny_llm(CASE, mesh)
    params = [random_params(seed) if seed % 2 else SamplingParams(max_tokens=12, ignore_eos=True) for seed in range(5)]
    together = [out.token_ids for out in llm.generate(PROMPTS, params)]
    alone = [llm.generate([p], s)[0].token_ids for p, s in zip(PROMPTS, params, strict=True)]
    assert together == alone


def test_the_same_seed_gives_the_same_tokens_on_any_mesh(tiny_llm):
    outputs = [
        [out.token_ids for out in tiny_llm(CASE, mesh).generate(PROMPTS, random_params(11))]
        for mesh in (ONE_DEVICE, MESH)
    ]
    assert outputs[0] == outputs[1]


def test_a_mesh_of_ones_own_is_loaded_as_it_stands(tiny_llm, tiny_dir):
    devices, axis_types = np.array(jax.devices())[[5, 2]], (jax.sharding.AxisType.Explicit,)
    llm = LLM.load(tiny_dir(CASE), mesh=jax.sharding.Mesh(devices, ("tensor",), axis_types=axis_types), dtype="float32")
    assert [device.id for device in llm.mesh.devices.flat] == [5, 2]
    assert llm.mesh.shape["tensor"] == 2
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    found, alone = (each.generate(PROMPTS[:2], params) for each in (llm, tiny_llm(CASE, ONE_DEVICE)))
    assert [out.token_ids for out in found] == [out.token_ids for out in alone]


def test_axes_of_a_mesh_of_ones_own_may_stand_in_any_order(tiny_dir):
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("tensor", "data"))
    llm = LLM.load(tiny_dir(CASE), mesh=mesh, dtype="float32")
    groups = llm.mesh.devices.reshape(2, 4)
    assert [[device.id for device in group] for group in groups] == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_a_mesh_of_fewer_devices_than_there_are_is_loaded(tiny_dir, caplog):
    llm = LLM.load(tiny_dir(CASE), mesh="tensor=2", dtype="float32")
    assert [device.id for device in llm.mesh.devices.flat] == [0, 1]
    assert any("tensor=2 takes 2 of 8 cpu devices (0, 1)" in message for message in caplog.messages)


def test_logprobs_are_those_of_score(tiny_llm):
    llm = tiny_llm(CASE, ONE_DEVICE)
    for out in llm.generate(PROMPTS, random_params(5)):
        (scored,) = llm.score([out.prompt_token_ids + out.token_ids])
        np.testing.assert_allclose(scored[-len(out.token_ids) :], out.logprobs, atol=2e-4)


@pytest.mark.parametrize("mesh", [ONE_DEVICE, MESH])
def test_pool_for_says_what_generate_holds(mesh, tiny_llm):
    llm = tiny_llm(CASE, mesh)
    llm._core = None  # a core there is already may be larger
    tokens, num_bytes = llm._pool_for(PROMPTS, random_params(1, tokens=40))
    assert llm._core is None
    llm.generate(PROMPTS, random_params(1, tokens=40))
    assert tokens * num_bytes == sum(part.nbytes for part in jax.tree.leaves(llm._core._worker.state.pages))
    assert tokens >= sum(len(prompt) + 40 for prompt in PROMPTS)
    assert llm._pool_for(PROMPTS[:1], random_params(1)) == (tokens, num_bytes)  # the pool there is has room for that
    with pytest.raises(RequestError, match="prompt 0 is empty"):
        llm._pool_for([[]])


def test_more_requests_than_a_batch_come_back_in_order(tiny_dir):
    llm = LLM.load(tiny_dir(CASE), mesh=mesh_of(ONE_DEVICE), dtype="float32", max_num_seqs=2)
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    outputs = llm.generate(PROMPTS, params)
    assert [out.index for out in outputs] == [0, 1, 2, 3, 4]
    assert [out.prompt_token_ids for out in outputs] == PROMPTS
    assert [out.token_ids for out in outputs] == [llm.generate([p], params)[0].token_ids for p in PROMPTS]


def test_stream_gives_the_tokens_of_generate(tiny_llm):
    llm = tiny_llm(CASE, ONE_DEVICE)
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (1, 5, 3, 5, 2)]
    chunks = list(llm.stream(PROMPTS, params))
    for out in llm.generate(PROMPTS, params):
        mine = [chunk for chunk in chunks if chunk.index == out.index]
        assert [chunk.token_id for chunk in mine] == out.token_ids
        assert [chunk.finish_reason for chunk in mine] == [None] * (len(mine) - 1) + ["length"]


def test_any_eos_of_generation_config_ends_a_request(tiny_dir, tiny_llm, tmp_path):
    params = SamplingParams(max_tokens=10)
    free = tiny_llm(CASE, ONE_DEVICE).generate([PROMPTS[1]], SamplingParams(max_tokens=10, ignore_eos=True))[0]
    ends = [max(free.token_ids, key=lambda t: free.token_ids.index(t)), 10**6]  # the id that first comes last
    first = free.token_ids.index(ends[0])
    directory = tmp_path / "model"
    shutil.copytree(tiny_dir(CASE), directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    out = LLM.load(directory, mesh=mesh_of(ONE_DEVICE), dtype="float32").generate([PROMPTS[1]], params)[0]
    assert out.token_ids == free.token_ids[: first + 1]
    assert out.finish_reason == "stop"


def test_text_goes_on_from_the_prompt_and_ends_at_stop_strings(tiny_llm):
    llm = tiny_llm(CASE, ONE_DEVICE)
    free = llm.generate([PROMPTS[1]], SamplingParams(max_tokens=8, ignore_eos=True))[0].token_ids
    special = free[max(range(6), key=lambda at: free.index(free[at]))]  # the id of the first six that first comes last
    words = HFTokenizer(models.WordLevel({f"\u2581{i}": i for i in range(llm.config.vocab_size)}, "\u25810"))
    words.decoder = decoders.Metaspace()
    words.add_special_tokens([AddedToken(f"\u2581{special}")])
    tokenizer = CheckpointTokenizer(words, {}, None)
    llm = LLM.from_runner(llm._runner, tokenizer=tokenizer, eos=frozenset())

    def answer(**options) -> tuple[list[int], str, str]:
        params = SamplingParams(max_tokens=8, **options)
        (out,) = llm.generate([PROMPTS[1]], params)
        assert "".join(chunk.text for chunk in llm.stream([PROMPTS[1]], params)) == out.text
        return out.token_ids, out.text, out.finish_reason

    shown = [f" {i}" for i in free if i != special]
    assert answer() == (free, "".join(shown), "length")
    assert tokenizer.decode(PROMPTS[1] + free) == tokenizer.decode(PROMPTS[1]) + "".join(shown)
    assert answer(stop=(f"{free[0]}",)) == (free[:1], " ", "stop")
    end = free.index(special)
    assert end >= 2
    least = end - 1  # the text of every token has a space
    assert answer(stop=(" ",), min_tokens=least) == (free[:end], "".join(shown[:least]), "stop")
    assert answer(stop=(f"\u2581{special}",)) == (free[: end + 1], "".join(shown[:end]), "stop")


def test_a_request_ends_where_the_context_is_full(tiny_llm):
    llm = tiny_llm(CASE, ONE_DEVICE)
    context = llm.config.max_position_embeddings
    out = llm.generate([[1] * (context - 3)], SamplingParams(max_tokens=50, ignore_eos=True))[0]
    assert len(out.token_ids) == 3
    assert out.finish_reason == "length"


def test_a_context_that_is_no_round_number_is_kept(tiny_dir, tmp_path):
    directory = shutil.copytree(tiny_dir(CASE), tmp_path / "model")
    config = json.loads((directory / "config.json").read_text()) | {"max_position_embeddings": 100}
    (directory / "config.json").write_text(json.dumps(config))
    llm = LLM.load(directory, mesh=mesh_of(ONE_DEVICE), dtype="float32")
    (out,) = llm.generate([[1] * 90], SamplingParams(max_tokens=50, ignore_eos=True))
    assert len(out.token_ids) == 10


def test_a_stream_nobody_listens_to_costs_nothing(tiny_llm):
    llm = tiny_llm(CASE, ONE_DEVICE)
    (wanted,) = llm.generate([PROMPTS[0]], random_params(1))
    dropped = [llm.stream(PROMPTS, random_params(2)) for _ in range(5)]
    begun = llm.stream(PROMPTS, random_params(3))
    next(begun)
    begun.close()
    before = llm._core.scheduler.num_steps
    assert llm.generate([PROMPTS[0]], random_params(1))[0].token_ids == wanted.token_ids
    assert llm._core.scheduler.num_steps - before < 20
    assert len(dropped) == 5


def test_threads_may_share_a_model(tiny_llm):
    llm = tiny_llm(CASE, ONE_DEVICE)
    wanted = [out.token_ids for out in llm.generate(PROMPTS, random_params(4))]
    with ThreadPoolExecutor(5) as threads:
        found = list(threads.map(lambda prompt: llm.generate([prompt], random_params(4))[0].token_ids, PROMPTS * 4))
    assert found == wanted * 4


def test_an_interruption_leaves_the_model_whole(tiny_llm, monkeypatch):
    llm = tiny_llm(CASE, ONE_DEVICE)
    wanted = llm.generate([PROMPTS[0]], random_params(4))[0].token_ids
    other = llm.stream([PROMPTS[0]], random_params(4))
    heard = [next(other).token_id]
    real = llm._runner.step

    def interrupted(*arguments, **named):
        real(*arguments, **named)  # the pages are donated, and nobody hears of the new ones
        raise KeyboardInterrupt

    monkeypatch.setattr(llm._runner, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([PROMPTS[1]], random_params(4))
    monkeypatch.undo()
    assert llm.generate([PROMPTS[0]], random_params(4))[0].token_ids == wanted
    assert heard + [chunk.token_id for chunk in other] == wanted


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ([], "no prompts"), ([[]], "prompt 0 is empty"),
        ([[1], [2, 10**6]], "prompt 1 has token id 1000000 at position 1"),
        ([[-1]], "token id -1"), ([[1.5]], "token id 1.5"), ([[True]], "token id True"), (["text"], "no tokenizer"),
        ([[1] * 4096], "has 4096 tokens"), ("text", "list of texts"),
        (None, "not None"), (7, "not 7"),
    ],
)  # fmt: skip
def test_bad_prompts_are_request_errors(prompts, said, tiny_llm):
    with pytest.raises(RequestError, match=said):
        tiny_llm(CASE, ONE_DEVICE).generate(prompts)


@pytest.mark.parametrize("params", [None, {"max_tokens": 2}, [3], [SamplingParams(), SamplingParams()]])
def test_bad_params_are_request_errors(params, tiny_llm):
    with pytest.raises(RequestError, match="SamplingParams"):
        tiny_llm(CASE, ONE_DEVICE).generate([[1, 2]], params)


def test_prompts_may_come_from_any_iterable(tiny_llm):
    llm, params = tiny_llm(CASE, ONE_DEVICE), SamplingParams(max_tokens=2, ignore_eos=True)
    assert llm.generate(iter([[1, 2]]), params) == llm.generate(np.array([[1, 2]]), params)
    assert len(llm.score(np.array([[1, 2, 3]]))[0]) == 2


@pytest.mark.parametrize(
    "values",
    [
        dict(max_tokens=0), dict(max_tokens=1.5), dict(temperature=float("nan")), dict(temperature=-1),
        dict(temperature=float("inf")), dict(top_p=0), dict(top_p=1.01), dict(min_p=-0.1), dict(top_k=-2),
        dict(seed=-(2**63) - 1), dict(seed=2**64), dict(seed="x"), dict(stop=("",)), dict(stop=(1,)),
        dict(temperature="hot"), dict(top_k=True),
    ],
)  # fmt: skip
def test_bad_sampling_values_name_themselves(values):
    (name,) = values
    with pytest.raises(RequestError, match=name):
        SamplingParams(**values)


def test_buckets_are_few_and_close():
    sizes = {bucket(n) for n in range(1, 4097)}
    assert len(sizes) <= 20
    assert all(n <= bucket(n) <= max(16, 2 * n) for n in range(1, 4097))
