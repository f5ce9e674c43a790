"""Generation: equal to transformers, with and without cache, alone and in a batch, on any number of tensor ranks."""

import pytest
import torch
from ranks import run_on_ranks
from transformers_models import gpt2, llama, load_serial, serial, shake

from megatron_lite.errors import UserError
from megatron_lite.generate.generate import Prompt, generate
from megatron_lite.generate.sampling import Sampling
from megatron_lite.model.gpt import GPT
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.pipeline.partition import balanced_counts, stages_of_counts
from megatron_lite.parallel.process_mesh import ProcessMesh

VOCABULARY, POSITIONS, NEW = 101, 48, 20
GREEDY = Sampling(temperature=0)
PROMPTS = [[5, 17, 2, 9, 33, 8, 1], [40, 3], [77, 6, 5, 4, 3, 2, 1, 0, 99, 12, 64, 7]]


def _references():
    cases = {}
    for name, (theirs, config) in {
        "gpt2": gpt2(VOCABULARY, POSITIONS),
        "llama": llama(VOCABULARY, POSITIONS, kv_heads=2),
    }.items():
        shake(theirs)
        greedy = [_their_greedy(theirs, prompt) for prompt in PROMPTS]
        weights = {key: value.numpy() for key, value in serial(theirs).items()}
        cases[name] = {"config": config, "weights": weights, "greedy": greedy}
    return cases


def _their_greedy(theirs, prompt, **options):
    ids = torch.tensor([prompt])
    out = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, pad_token_id=0, **options
    )
    return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def references():
    return _references()


@pytest.fixture(scope="module")
def mesh():
    return ProcessMesh.create(MeshShape())


def our_model(case, mesh):
    pipe, weights = mesh.size("pipe"), case["weights"]
    model = GPT(
        case["config"],
        mesh,
        vocab_size=VOCABULARY,
        seq_length=POSITIONS,
        stages=stages_of_counts(balanced_counts(case["config"].num_layers, pipe, embedding=0, head=0)),
        placement=range(pipe),
    )
    held = dict(model.named_parameters()) if pipe > 1 else weights
    load_serial(model, {name: torch.from_numpy(weights[name]) for name in held})
    return model.eval()


def run(model, mesh, prompts, sampling=GREEDY, **options):
    options = {"max_new_tokens": NEW, **options}
    rows = [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts]
    return generate(model, mesh, rows, sampling, **options)


def tokens_of(continuations):
    return [continuation.tokens for continuation in continuations]


def _check(tensor, references, pipe=1):
    mesh = ProcessMesh.create(MeshShape(pipe, tensor=tensor))
    drawn = []
    for case in references.values():
        model = our_model(case, mesh)
        assert tokens_of(run(model, mesh, PROMPTS)) == case["greedy"]
        assert tokens_of(run(model, mesh, PROMPTS, use_cache=False)) == case["greedy"]
        drawn.append(tokens_of(run(model, mesh, PROMPTS, Sampling(temperature=1.3, top_k=40, top_p=0.95, seed=3))))
    return drawn


def test_greedy_equals_transformers_and_samples_agree_on_1_2_and_4_tensor_ranks(references):
    drawn = _check(1, references)
    for size in (2, 4):
        assert run_on_ranks(_check, size, size, references) == [drawn] * size


def test_a_pipeline_generates_the_same(references):
    drawn = _check(1, references)
    assert run_on_ranks(_check, 2, 1, references, pipe=2) == [drawn] * 2
    assert run_on_ranks(_check, 4, 2, references, pipe=2) == [drawn] * 4


def test_greedy_with_a_repetition_penalty_equals_transformers(mesh):
    theirs, config = gpt2(VOCABULARY, POSITIONS)
    shake(theirs)
    model = our_model({"config": config, "weights": {k: v.numpy() for k, v in serial(theirs).items()}}, mesh)
    expected = [_their_greedy(theirs, prompt, repetition_penalty=1.4) for prompt in PROMPTS]
    assert tokens_of(run(model, mesh, PROMPTS, Sampling(temperature=0, repetition_penalty=1.4))) == expected
    assert expected != [_their_greedy(theirs, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_row_is_the_same_alone_and_in_a_batch(references, mesh, use_cache):
    for case in references.values():
        model = our_model(case, mesh)
        sampling = Sampling(seed=11)
        rows = [Prompt(prompt, sample) for prompt in PROMPTS for sample in range(3)]
        together = run(model, mesh, rows, sampling, use_cache=use_cache)
        assert tokens_of(together) == [tokens_of(run(model, mesh, [row], sampling))[0] for row in rows]
        assert len({tuple(row.tokens) for row in together}) == len(rows)
        assert tokens_of(run(model, mesh, rows, Sampling(seed=12))) != tokens_of(together)


def test_rows_that_end_early_do_not_disturb_the_others(references, mesh):
    for case in references.values():
        model = our_model(case, mesh)
        end = case["greedy"][2][3]  # the longest prompt ends first, so that columns of the cache are dropped
        expected = [row[: row.index(end)] if end in row else row for row in case["greedy"]]
        result = run(model, mesh, PROMPTS, end_token=end)
        assert tokens_of(result) == expected
        assert [row.reason for row in result] == ["end" if end in row else "length" for row in case["greedy"]]
        assert result[2].reason == "end" and len(result[2].tokens) <= 3


def test_each_row_goes_to_the_last_position_and_says_so(references, mesh, capsys):
    for case in references.values():
        model = our_model(case, mesh)
        prompts = [[1] * (POSITIONS - 2), [2, 3], [4] * POSITIONS]
        result = run(model, mesh, prompts, max_new_tokens=40)
        assert [(len(row.tokens), row.reason) for row in result] == [(3, "context"), (40, "length"), (1, "context")]
        assert tokens_of(result) == [tokens_of(run(model, mesh, [prompt], max_new_tokens=40))[0] for prompt in prompts]
    said = capsys.readouterr().err
    assert "2 of 3 prompts are continued by fewer than 40 tokens" in said
    assert "48 positions, and prompt 3 has 48 tokens, which leaves 1" in said


def test_every_token_is_told_and_the_listener_can_end_a_row(references, mesh):
    model = our_model(references["llama"], mesh)
    told = {0: [], 1: [], 2: []}

    def listen(row, token):
        told[row].append(token)
        return row == 1 and len(told[row]) == 4

    result = run(model, mesh, PROMPTS, on_token=listen)
    assert tokens_of(result) == [told[0], told[1], told[2]]
    assert [row.reason for row in result] == ["length", "stop", "length"]
    assert told[1] == references["llama"]["greedy"][1][:4]


def test_ids_beyond_the_tokenizer_are_never_drawn(references, mesh):
    model = our_model(references["gpt2"], mesh)
    drawn = tokens_of(run(model, mesh, [[1], [2]], Sampling(temperature=50.0), vocab_size=10))
    assert max(max(row) for row in drawn) == 9
    drawn = tokens_of(run(model, mesh, [Prompt([1], i) for i in range(40)], Sampling(temperature=50.0), vocab_size=500))
    assert max(max(row) for row in drawn) == VOCABULARY - 1


def test_unfit_prompts_are_refused_with_the_numbers(references, mesh):
    model = our_model(references["gpt2"], mesh)
    for prompt, message in [
        ([], "prompt 2 of 2 is empty"),
        ([1] * 50, "prompt 2 of 2 has 50 tokens and the model was trained for 48 positions; shorten it by 2"),
        ([VOCABULARY], "prompt 2 of 2 has token id 101 and the model knows ids 0 to 100"),
    ]:
        with pytest.raises(UserError, match=message):
            run(model, mesh, [[1], prompt])
    with pytest.raises(UserError, match="max_new_tokens=0 is too small"):
        run(model, mesh, [[1]], max_new_tokens=0)


def test_no_prompt_gives_nothing(references, mesh):
    assert run(our_model(references["gpt2"], mesh), mesh, []) == []
