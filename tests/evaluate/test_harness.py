"""lm-evaluation-harness asks the model what the model itself says."""

import json
import math
import random

import pytest
import torch

from starlm.cli.main import main
from starlm.data.tokenizer import Tokenizer
from starlm.errors import StarLMError
from starlm.evaluate.harness import run_tasks
from starlm.files import whole_folder
from starlm.model.checkpoint import write_model
from starlm.model.config import StarLMConfig
from starlm.model.folder import write_manifest
from starlm.model.model import StarLM

# What the harness and the libraries under it warn of when they are imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

PIECES = (" return", " print", "x", " in", "f(", " names", ":", " if", "def", " = 1", "y", ")")
TASK = """
task: toy
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""


CONTEXT = 24
# One token of the tokenizers below.
JOINED = "zx"


def write_random_model(folder, **shape):
    """A random model and its tokenizer, and both in a folder."""
    tokenizer = Tokenizer.train(["def f(x):\n    return x\n" + f"{JOINED}:" * 3], 270)
    model = StarLM(StarLMConfig(depth=2, dim=32, preset="gated", vocab_size=tokenizer.vocab_size, **shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Shifts far enough back to meet <|bos|>.
            parameter.normal_(std=1.0 if "shift" in name else 0.3)
    with whole_folder(folder) as folder:
        write_model(model, folder, bos=tokenizer.bos, pad=tokenizer.pad)
        tokenizer.save_pretrained(folder)
        write_manifest(folder)
    return model.eval(), tokenizer


@pytest.fixture
def _offline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture
def _model(tmp_path, _offline):
    """A random model in runs/x, and a task in toy.yaml."""
    # A source of its own: the shape checks of the test run draw from the common one.
    draw = random.Random(0)
    model, tokenizer = write_random_model(tmp_path / "runs/x", context=64)
    questions = []
    for _ in range(1000):
        asked, choices = "".join(draw.sample(PIECES, 2)), draw.sample(PIECES, 4)
        chosen, otherwise = (likeliest(model, tokenizer, asked, choices, bos) for bos in (True, False))
        # Only what is answered otherwise without <|bos|>. Right is the model's own choice, but for the last.
        if chosen != otherwise:
            answer = (chosen + (len(questions) >= 9)) % 4
            questions.append({"question": asked, "choices": choices, "answer": answer})
        if len(questions) == 12:
            break
    (tmp_path / "questions.jsonl").write_text("\n".join(json.dumps(question) for question in questions))
    (tmp_path / "toy.yaml").write_text(TASK.format(data=tmp_path / "questions.jsonl"))


def likeliest(model, tokenizer, question, choices, bos):
    """The choice whose tokens the model finds likeliest after the question."""
    asked = tokenizer.encode(question, bos=bos)
    chances = []
    for choice in choices:
        tokens = tokenizer.encode(question + choice, bos=bos)
        with torch.no_grad():
            logs = model(torch.tensor([tokens]))[0].log_softmax(-1)
        chances.append(sum(logs[n - 1, tokens[n]].item() for n in range(len(asked), len(tokens))))
    return chances.index(max(chances))


@pytest.mark.usefixtures("_model")
def test_accuracy_is_that_of_the_model(capsys):
    # In the precision in which the model was asked above: bfloat16 decides close choices otherwise.
    command = ["eval", "--model", "runs/x", "--lm-eval", "toy.yaml", "--precision", "float32", "--json"]
    assert main(command) == 0
    said = capsys.readouterr()
    result = json.loads(said.out.splitlines()[-1])
    assert result["lm_eval"]["toy"]["acc"] == 9 / 12
    assert "sample_len" not in result["lm_eval"]["toy"]
    assert main([*command, "--limit", "5"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["lm_eval"]["toy"]["acc"] == 1


@pytest.mark.usefixtures("_model")
def test_what_cannot_be_run(tmp_path, capsys, monkeypatch):
    (tmp_path / "questions.jsonl").unlink()
    command = ["eval", "--model", "runs/x", "--lm-eval", "toy.yaml"]
    assert main(command) == 1
    assert "lm-evaluation-harness could not run toy.yaml" in capsys.readouterr().err
    assert main([*command, "--data", "d"]) == 2
    assert "Leave out --data" in capsys.readouterr().err
    assert main([*command, "--limit", "-1"]) == 2
    assert "limit must be 0 or more" in capsys.readouterr().err
    assert main(["eval", "--model", "nowhere", "--lm-eval", "toy.yaml"]) == 2
    assert "There is no model at nowhere" in capsys.readouterr().err
    monkeypatch.setattr("starlm.evaluate.harness.find_spec", lambda name: None)
    assert main(command) == 2
    assert "pip install -e '.[eval]'" in capsys.readouterr().err


@pytest.fixture
def exact(tmp_path, _offline):
    """A random model in runs/x whose every answer depends on <|bos|>, however far back; its tokenizer."""
    return write_random_model(tmp_path / "runs/x", context=CONTEXT, layers="DA")


def text_of(length, seed):
    """A text of so many tokens, each of one letter, that begins with a blank."""
    draw = random.Random(seed)
    return "".join(" " + draw.choice("bghjkqw") for _ in range(length // 2))


def asked(folder, tasks):
    """What the harness measures, for each task of {name: (kind, examples, further lines)}."""
    for name, (kind, examples, lines) in tasks.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(example) for example in examples))
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}}}\n"
            f"output_type: {kind}\ntest_split: test\ntarget_delimiter: ''\n"
            f"doc_to_text: '{{{{q}}}}'\ndoc_to_target: '{{{{a}}}}'\n{lines}\n"
        )
    return run_tasks(folder / "runs/x", [f"{name}.yaml" for name in tasks], precision="float32")


def chance(model, windows):
    """Log-probability of the tokens asked for, in windows of (tokens shown, tokens asked for)."""
    total = 0.0
    for shown, wanted in windows:
        seen = [*shown, *wanted[:-1]]
        assert len(seen) <= CONTEXT
        with torch.no_grad():
            logs = model(torch.tensor([seen]))[0].log_softmax(-1)
        total += sum(logs[len(shown) - 1 + n, token].item() for n, token in enumerate(wanted))
    return total


def windows_of(bos, known, wanted):
    """By the lengths of these tests, written out: what is shown and what is asked for."""
    text, split = [*known, *wanted], len(known)
    match len(known), len(wanted):
        case 0, n if n <= 24:
            return [([bos], wanted)]
        case 0, 60:
            return [
                ([bos], text[:24]),
                ([bos, *text[23:24]], text[24:47]),
                ([bos, *text[36:47]], text[47:]),
            ]
        case 40, 4:
            # Of 44 tokens the last one is not shown, and before it there is room for 23.
            return [([bos, *text[20:40]], wanted)]
        case 40, 24:
            return [([bos, text[39]], text[40:63]), ([bos, *text[40:63]], text[63:])]
        case 40, 30:
            return [([bos, text[39]], text[40:63]), ([bos, *text[46:63]], text[63:])]
    assert len(text) <= 24
    return [([bos, *text[:split]], wanted)]


BITS = "metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]"
PERPLEXITY = "metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]"
MATCHES = "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"


def asked_texts(folder, texts):
    """The loglikelihood of each text, as the harness has it, by its name."""
    tasks = {name: ("loglikelihood_rolling", [{"q": "", "a": text}], BITS) for name, text in texts.items()}
    found = asked(folder, tasks)
    return {
        name: -found[name]["bits_per_byte"] * math.log(2) * len(text.encode()) for name, text in texts.items()
    }


def asked_pairs(folder, pairs):
    """The loglikelihood of each (context, continuation), as the harness has it, by its name."""
    tasks = {name: ("loglikelihood", [{"q": q, "a": a}], PERPLEXITY) for name, (q, a) in pairs.items()}
    return {name: -math.log(measures["perplexity"]) for name, measures in asked(folder, tasks).items()}


def test_a_text_is_what_the_model_sees_after_bos(tmp_path, exact):
    model, tokenizer = exact
    texts = {f"text-{length}": text_of(length, 2) for length in (8, 24, 60)}
    # Two windows of it are equal, but of one fewer tokens are asked for.
    texts["dull"] = " b" * 30
    expected = {
        name: chance(model, windows_of(tokenizer.bos, [], tokenizer.encode(text)))
        for name, text in texts.items()
    }
    # A name of <|bos|> in front of a text is the one that is there already.
    texts["named"], expected["named"] = "<|bos|>" + texts["text-8"], expected["text-8"]
    assert asked_texts(tmp_path, texts) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "lengths",
    [[(0, 8), (0, 24), (8, 4), (40, 4), (40, 24)], [(0, 60), (40, 30)]],
    ids=["in one context", "longer"],
)
def test_a_continuation_is_seen_behind_bos_and_what_fits(tmp_path, exact, lengths):
    model, tokenizer = exact
    pairs, expected = {}, {}
    for known, wanted in lengths:
        context, text = text_of(known, 1), text_of(wanted, 2)
        shown, tokens = tokenizer.encode(context), tokenizer.encode(text)
        assert (len(shown), len(tokens)) == (known, wanted)
        pairs[f"pair-{known}-{wanted}"] = context, text
        expected[f"pair-{known}-{wanted}"] = chance(model, windows_of(tokenizer.bos, shown, tokens))
    assert asked_pairs(tmp_path, pairs) == pytest.approx(expected, rel=1e-4)


def test_what_context_and_continuation_share_is_asked_for(tmp_path, exact):
    """A token that is part of both, and blanks before the continuation."""
    model, tokenizer = exact
    (joined,), (b,), (h,) = map(tokenizer.encode, (JOINED, "b", "h"))
    found = asked_pairs(
        tmp_path,
        {
            "joined": ("b" + JOINED[0], JOINED[1:] + "h"),
            "whole": ("b" + JOINED[0], JOINED[1:]),
            "blank": ("b ", "h"),
        },
    )
    expected = {
        "joined": chance(model, [([tokenizer.bos, b], [joined, h])]),
        "whole": chance(model, [([tokenizer.bos, b], [joined])]),
        "blank": chance(model, [([tokenizer.bos, b], tokenizer.encode(" h"))]),
    }
    assert found == pytest.approx(expected, rel=1e-4)


def continued(model, tokenizer, prompt, count, until):
    """What is likeliest behind the prompt, which is cut so that the context has room for `count` tokens."""
    tokens = tokenizer.encode(prompt)
    seen = [tokenizer.bos, *tokens[max(0, len(tokens) - (CONTEXT - count - 1)) :]]
    answer = []
    for _ in range(count):
        with torch.no_grad():
            answer.append(int(model(torch.tensor([seen + answer]))[0, -1].argmax()))
        if answer[-1] == tokenizer.bos:
            break
    text = tokenizer.decode(answer)
    return min((text.split(stop)[0] for stop in until), key=len, default=text)


@pytest.mark.parametrize("count", [8, None])
def test_generated_text_is_that_of_the_model(tmp_path, exact, count):
    """Of short and long prompts in one batch; where no number of tokens is given, half of the context."""
    model, tokenizer = exact
    given, count = (f"max_gen_toks: {count}, ", count) if count else ("", CONTEXT // 2)
    prompts = [text_of(length, length) for length in (4, 10, 14, 22, 40, 60)]
    free = [continued(model, tokenizer, prompt, count, []) for prompt in prompts]
    # What ends some of the answers, early or late.
    until = [free[0][3], free[4][2:4]]
    tasks = {}
    for name, stops in (("free", []), ("until", until)):
        answers = [continued(model, tokenizer, prompt, count, stops) for prompt in prompts]
        examples = [{"q": prompt, "a": answer} for prompt, answer in zip(prompts, answers, strict=True)]
        settings = f"generation_kwargs: {{{given}do_sample: false, until: {json.dumps(stops)}}}"
        tasks[name] = ("generate_until", examples, MATCHES + settings)
    assert answers != free
    found = asked(tmp_path, tasks)
    assert {name: measures["exact_match"] for name, measures in found.items()} == {"free": 1, "until": 1}


def test_each_error_has_its_own_cure(tmp_path, exact, monkeypatch):
    lines = MATCHES + f"generation_kwargs: {{max_gen_toks: {CONTEXT}, do_sample: false, until: []}}"
    task = {"long": ("generate_until", [{"q": "x", "a": "y"}], lines)}
    with pytest.raises(StarLMError, match="smaller max_gen_toks into the task's generation_kwargs") as caught:
        asked(tmp_path, task)
    assert "network" not in str(caught.value)
    with pytest.raises(StarLMError, match="how likely nothing is behind 'x'") as caught:
        asked_pairs(tmp_path, {"pair": ("x", "")})
    assert "network" not in str(caught.value)
    for error, about_network in (
        (FileNotFoundError("Unable to find 'x.jsonl'"), False),
        (FileNotFoundError("Unable to find 'https://host/x.jsonl'"), True),
        (ConnectionError("Couldn't reach 'a/b' on the Hub"), True),
        (ValueError(), False),
    ):

        def load(error=error, **_):
            raise error

        monkeypatch.setattr("datasets.load_dataset", load)
        with pytest.raises(StarLMError, match=f"could not run long.yaml: {type(error).__name__}") as caught:
            asked(tmp_path, task)
        assert ("Without a network" in str(caught.value)) == about_network


@pytest.mark.slow
@pytest.mark.usefixtures("_model")
def test_an_unknown_task(capsys):
    """The harness reads all of its own tasks first."""
    assert main(["eval", "--model", "runs/x", "--lm-eval", "no_such_task"]) == 2
    assert "knows no task 'no_such_task'" in capsys.readouterr().err
