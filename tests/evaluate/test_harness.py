"""lm-evaluation-harness asks the model what the model itself says."""

import json
import random

import pytest
import torch

from starlm.cli.main import main
from starlm.data.tokenizer import Tokenizer
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


@pytest.fixture
def _model(tmp_path, monkeypatch):
    """A random model in runs/x, and a task in toy.yaml."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    # A source of its own: the shape checks of the test run draw from the common one.
    draw = random.Random(0)
    tokenizer = Tokenizer.train(["def f(x):\n    return x\n"], 270)
    model = StarLM(StarLMConfig(depth=2, dim=32, preset="gated", context=64, vocab_size=tokenizer.vocab_size))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Shifts far enough back to meet <|bos|>.
            parameter.normal_(std=1.0 if "shift" in name else 0.3)
    with whole_folder(tmp_path / "runs/x") as folder:
        write_model(model, folder, bos=tokenizer.bos, pad=tokenizer.pad)
        tokenizer.save_pretrained(folder)
        write_manifest(folder)
    questions = []
    for _ in range(1000):
        asked, choices = "".join(draw.sample(PIECES, 2)), draw.sample(PIECES, 4)
        chosen, otherwise = (likeliest(model.eval(), tokenizer, asked, choices, bos) for bos in (True, False))
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


@pytest.mark.slow
@pytest.mark.usefixtures("_model")
def test_an_unknown_task(capsys):
    """The harness reads all of its own tasks first."""
    assert main(["eval", "--model", "runs/x", "--lm-eval", "no_such_task"]) == 2
    assert "knows no task 'no_such_task'" in capsys.readouterr().err
