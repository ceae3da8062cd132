"""OpenAI's own client gets what it expects, streamed and not."""

import json
import re
import shutil
import subprocess
import threading
from pathlib import Path

import openai
import pytest
import torch
from servers import ENDLESS, TOKENIZER, wait_for

from starlm.generate.text import load

USER = [{"role": "user", "content": "def add"}]
KINDS = ["chat", "completion"]


def create(client, kind, **options):
    if kind == "chat":
        return client.chat.completions.create(**{"model": "tiny", "messages": USER, **options})
    return client.completions.create(**{"model": "tiny", "prompt": "def add", **options})


def text_of(choice):
    return choice.message.content if hasattr(choice, "message") else choice.text


def streamed(chunks):
    """Text and finish reason of every choice, and the usages."""
    texts, finishes, usages = {}, {}, []
    for chunk in chunks:
        usages += [chunk.usage] if chunk.usage else []
        for choice in chunk.choices:
            piece = choice.delta.content if hasattr(choice, "delta") else choice.text
            texts[choice.index] = texts.get(choice.index, "") + (piece or "")
            if choice.finish_reason:
                assert choice.index not in finishes
                finishes[choice.index] = choice.finish_reason
    return texts, finishes, usages


def test_models(client, server):
    models = {model.id: model for model in client.models.list()}
    assert {name: model.chat for name, model in models.items()} == {"tiny": "plain", "other": "template"}
    assert client.models.retrieve("tiny") == models["tiny"]
    assert models["tiny"].vocab_size == TOKENIZER.vocab_size
    with pytest.raises(openai.NotFoundError, match="There are: tiny, other"):
        client.models.retrieve("none")


def test_a_completion_is_what_the_model_says(client, run):
    """The server adds nothing and loses nothing: greedy text of the model alone, and its seeded samples."""
    model = load(run, device="cpu")
    for prompt in ("def add(a, b):", "def ", "", "你好 🙂"):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=20, temperature=0)
        assert answer.choices[0].text == model.generate(prompt, max_tokens=20, temperature=0)
    sampling = {"temperature": 0.9, "top_p": 0.9, "seed": 7}
    extra = {"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1}
    answer = client.completions.create(
        model="tiny", prompt="def", max_tokens=20, **sampling, extra_body=extra, presence_penalty=0.5
    )
    wanted = model.generate("def", max_tokens=20, **sampling, **extra, presence_penalty=0.5)
    assert answer.choices[0].text == wanted
    assert answer.usage.prompt_tokens == 1 + len(TOKENIZER.encode("def"))


def test_default_lengths(client):
    for kind, length in (("completion", 16), ("chat", 512)):
        answer = create(client, kind, **ENDLESS)
        assert answer.usage.completion_tokens == length
        assert answer.choices[0].finish_reason == "length"
    assert create(client, "chat", max_completion_tokens=3, **ENDLESS).usage.completion_tokens == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 3])
def test_streamed_is_the_same_as_whole(client, kind, n):
    options = {"max_tokens": 30, "seed": 3, "n": n, "temperature": 1.2}
    whole = create(client, kind, **options)
    chunks = list(create(client, kind, **options, stream=True, stream_options={"include_usage": True}))
    texts, finishes, usages = streamed(chunks)
    assert texts == {choice.index: text_of(choice) for choice in whole.choices}
    assert finishes == {choice.index: choice.finish_reason for choice in whole.choices}
    assert len(set(texts.values())) == n, "samples must differ"
    (usage,) = usages
    assert chunks[-1].choices == []
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_events_on_the_wire(server):
    body = {"model": "tiny", "messages": USER, "stream": True, "max_tokens": 3, **ENDLESS}
    answer = server.post("/v1/chat/completions", body)
    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    events = answer.body.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert all(set(delta) == {"content"} for delta in deltas[1:-1])
    assert deltas[-1] == {}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + [
        "length"
    ]
    assert not any("usage" in chunk for chunk in chunks)


def test_without_a_seed_answers_differ(client):
    texts = {create(client, "completion", max_tokens=20).choices[0].text for _ in range(3)}
    assert len(texts) > 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True])
def test_stop(client, kind, stream):
    options = {"max_tokens": 60, "seed": 5, **ENDLESS}
    whole = text_of(create(client, kind, **options).choices[0])
    stop = whole[10:13]
    for given in (stop, ["never there", stop]):
        answer = create(client, kind, **options, stop=given, stream=stream)
        if stream:
            texts, finishes, _ = streamed(answer)
            got, finish = texts[0], finishes[0]
        else:
            got, finish = text_of(answer.choices[0]), answer.choices[0].finish_reason
        assert (got, finish) == (whole[: whole.index(stop)], "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(client, stream):
    options = {"max_tokens": 8, "seed": 1, "logprobs": True, "top_logprobs": 3, "temperature": 1.0, **ENDLESS}
    answer = create(client, "chat", **options, stream=stream)
    if stream:
        choices = [chunk.choices[0] for chunk in answer]
        entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
        text = "".join(choice.delta.content or "" for choice in choices)
    else:
        entries, text = answer.choices[0].logprobs.content, answer.choices[0].message.content
    assert len(entries) == 8
    spoken = b"".join(bytes(entry.bytes) for entry in entries).decode(errors="replace")
    assert spoken == text
    for entry in entries:
        top = [other.logprob for other in entry.top_logprobs]
        assert len(top) == 3
        assert top == sorted(top, reverse=True)
        assert entry.logprob <= top[0] <= 0


def test_completion_logprobs_are_the_models(client, run):
    options = {"max_tokens": 6, "temperature": 0, "logprobs": 2}
    lists = client.completions.create(model="tiny", prompt="def", **options).choices[0].logprobs
    model = load(run, device="cpu")
    ids = [TOKENIZER.bos, *TOKENIZER.encode("def")]
    for token, logprob, top in zip(lists.tokens, lists.token_logprobs, lists.top_logprobs, strict=True):
        with torch.no_grad():
            chances = model.model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        ids.append(int(chances.argmax()))
        spoken = TOKENIZER.token_bytes(ids[-1])
        assert token == (spoken.decode() if spoken.isascii() else "bytes:" + repr(spoken)[2:-1])
        assert logprob == pytest.approx(float(chances.max()), abs=1e-4)
        assert len(top) <= 2
        assert token in top
        assert max(top.values()) == pytest.approx(logprob)
    text = TOKENIZER.decode(ids[2:])
    assert lists.text_offset[0] == 0
    for offset, token in zip(lists.text_offset, lists.tokens, strict=True):
        # Bytes that turned out to be no character come first.
        assert token.startswith("bytes:") or text[offset:].lstrip("\ufffd").startswith(token)


def test_completion_logprobs_of_draws(client):
    """The token that was drawn is among the alternatives, as OpenAI has it; blanks asked for are no text."""
    spoken = map(TOKENIZER.token_bytes, range(TOKENIZER.vocab_size))
    plain = {str(number): -100 for number, piece in enumerate(spoken) if not piece or not piece.isascii()}
    options = {"max_tokens": 12, "temperature": 2, "logprobs": 2, "seed": 3, "logit_bias": plain}
    choices = client.completions.create(model="tiny", prompt=["def", "def   "], n=2, **options).choices
    for choice, blanks in zip(choices, (0, 0, 3, 3), strict=True):
        lists = choice.logprobs
        at = 0
        for place, token, logprob, top in zip(*(lists.text_offset, lists.tokens, lists.token_logprobs),
                                              lists.top_logprobs, strict=True):  # fmt: skip
            assert top[token] == logprob
            assert 2 <= len(top) <= 3
            assert place == max(at - blanks, 0)
            at += len(token)
        assert choice.text == "".join(lists.tokens)[blanks:]


def test_several_prompts_and_token_ids(client):
    options = {"max_tokens": 10, "temperature": 0}
    texts = ["def add", "return", ""]
    one_by_one = [
        client.completions.create(model="tiny", prompt=text, **options).choices[0].text for text in texts
    ]
    ids = [[TOKENIZER.bos, *TOKENIZER.encode(text)] for text in texts]
    for prompt in (texts, ids):
        answer = client.completions.create(model="tiny", prompt=prompt, **options, n=2)
        assert [choice.index for choice in answer.choices] == list(range(6))
        assert [choice.text for choice in answer.choices[::2]] == one_by_one
    assert client.completions.create(model="tiny", prompt=ids[0], **options).choices[0].text == one_by_one[0]


def test_logit_bias(client):
    wanted = TOKENIZER.encode("🙂"[:1])[0]
    answer = create(client, "completion", logit_bias={str(wanted): 100}, max_tokens=4, logprobs=0)
    assert answer.choices[0].logprobs.token_logprobs
    assert answer.usage.completion_tokens == 4
    with pytest.raises(openai.BadRequestError, match=r"token ids below \d+ as keys; got '-1'"):
        create(client, "completion", logit_bias={"-1": 1})


def test_models_differ_and_templates_are_used(client):
    answers = {m: create(client, "chat", model=m, seed=1, max_tokens=5) for m in ("tiny", "other")}
    assert answers["other"].model == "other"
    asked = ["<|bos|>", "<|user_start|>", *TOKENIZER.encode("def add"), "<|user_end|>", "<|assistant_start|>"]
    assert answers["other"].usage.prompt_tokens == len(asked)
    parts = [{"role": "user", "content": [{"type": "text", "text": "def"}, {"type": "text", "text": " add"}]}]
    again = create(client, "chat", model="other", messages=parts, seed=1, max_tokens=5)
    assert text_of(again.choices[0]) == text_of(answers["other"].choices[0])


def test_cancelling_frees_the_slot(client, server):
    stream = create(client, "chat", stream=True, max_tokens=100_000, **ENDLESS)
    next(iter(stream))
    wait_for(lambda: server.metrics()['starlm_requests_running{model="tiny"}'] == 1)
    stream.close()
    wait_for(server.idle)
    assert server.metrics()['starlm_generation_tokens_total{model="tiny"}'] > 0


def test_concurrent_clients_get_what_they_would_alone(client):
    def ask(seed):
        return text_of(create(client, "completion", seed=seed, max_tokens=20, temperature=1.0).choices[0])

    alone = [ask(seed) for seed in range(8)]
    together: list = [None] * 8

    def work(seed):
        together[seed] = ask(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_metrics_count(client, server):
    def count(name, model="tiny"):
        return server.metrics().get(f'{name}{{model="{model}"}}', 0)

    names = (
        "starlm_prompt_tokens_total",
        "starlm_generation_tokens_total",
        "starlm_time_to_first_token_seconds_count",
        "starlm_inter_token_latency_seconds_count",
    )
    before = [count(name) for name in names]
    usage = create(client, "completion", max_tokens=9, **ENDLESS).usage
    wait_for(lambda: count(names[0]) > before[0])
    prompt, written, first, between = (count(name) - b for name, b in zip(names, before, strict=True))
    assert (prompt, written, first, between) == (usage.prompt_tokens, 9, 1, 8)
    assert 'starlm_http_requests_total{path="/v1/completions",status="200"}' in server.metrics()


def test_the_log_has_a_line_per_request(client, server):
    answer = client.completions.with_raw_response.create(model="tiny", prompt="a", max_tokens=4, **ENDLESS)
    number = answer.headers["x-request-id"]

    def line():
        found = [json.loads(text) for text in server.log.read_text().splitlines() if number in text]
        return found and found[0]

    found = wait_for(line)
    assert {key: found[key] for key in ("method", "path", "status", "model", "completion_tokens")} == {
        **{
            "method": "POST",
            "path": "/v1/completions",
            "status": 200,
            "model": "tiny",
            "completion_tokens": 4,
        }
    }
    assert found["seconds"] > 0


def test_reads(server):
    body = {"model": "tiny", "text": "def add(a, b): def add(a, b):"}
    found = server.post("/v1/starlm/reads", body).body
    ids = TOKENIZER.encode(body["text"], bos=True)
    assert [token["id"] for token in found["tokens"]] == ids
    assert {head["kind"] for head in found["heads"]} >= {"now", "box"}
    for head in found["heads"]:
        assert len(head["rows"]) == len(ids)
        for number, rows in enumerate(head["rows"]):
            assert all(0 <= row <= number and 0 <= share <= 1 for row, share in rows)
    same = server.post("/v1/starlm/reads", {"model": "tiny", "tokens": ids}).body
    assert same["heads"] == found["heads"]
    turns = [*USER, {"role": "assistant", "content": "return"}]
    chat = server.post("/v1/starlm/reads", {"model": "other", "messages": turns}).body
    assert "".join(t["text"] for t in chat["tokens"][chat["begin"] :]) == "return"
    assert chat["tokens"][chat["begin"] - 1]["text"] == "<|assistant_start|>"


README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def shown(language):
    """The README's blocks that speak to a server."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [block for block in blocks if "127.0.0.1:8000" in block]


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_what_the_readme_shows_works(server, capsys):
    (commands,), (program,) = shown("sh"), shown("py")
    here = str(server.port)
    # The server of these tests is elsewhere, and has another model.
    commands, program = (
        text.replace("8000", here).replace('"demo"', '"tiny"') for text in (commands, program)
    )
    done = subprocess.run(["sh", "-ec", commands], capture_output=True, text=True, check=True)
    whole, streamed = done.stdout.split("}data: ", 1)
    assert json.loads(whole + "}")["object"] == "text_completion"
    assert streamed.endswith("data: [DONE]\n\n")
    exec(compile(program, "README.md", "exec"), {})
    assert capsys.readouterr().out
