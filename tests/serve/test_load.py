"""Many clients, many requests, and everything that the OpenAPI document allows."""

import http.client
import json
import threading

import openai
import psutil
import pytest
from servers import ENDLESS, wait_for

pytestmark = pytest.mark.slow


def test_64_clients(server):
    """More than there are slots: all get their own answers, and afterwards nothing is left."""
    wrong = []

    def work(number):
        try:
            with openai.OpenAI(
                base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120
            ) as client:
                for seed in (1, 1, 2):
                    chunks = client.completions.create(
                        model="tiny",
                        prompt="a" * (1 + number),
                        max_tokens=20,
                        seed=seed,
                        stream=True,
                        **ENDLESS,
                    )
                    answers.setdefault((number, seed), set()).add("".join(c.choices[0].text for c in chunks))
        except Exception as error:
            wrong.append(error)

    answers: dict[tuple[int, int], set[str]] = {}
    threads = [threading.Thread(target=work, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(150)
    assert wrong == []
    assert len(answers) == 128
    assert all(len(texts) == 1 for texts in answers.values()), "the same seed gave another text"
    assert server.idle()


def test_many_requests_leave_nothing_behind(server):
    """10,000 of every kind: whole, streamed, wrong, and left in the middle."""
    process = psutil.Process(server.process.pid)
    body = {"model": "tiny", "prompt": "a", "max_tokens": 2, **ENDLESS}
    kinds = [body, {**body, "stream": True}, {**body, "n": 0}, {**body, "max_tokens": 500, "stream": True}]

    def rounds(count):
        def work():
            for number in range(count // 8):
                connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
                kind = kinds[number % 4]
                data = json.dumps(kind)
                connection.request("POST", "/v1/completions", data, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                assert answer.status == (400 if kind is kinds[2] else 200)
                if kind is not kinds[3]:
                    answer.read()
                answer.close()
                connection.close()
                done.append(1)

        done: list[int] = []
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(done) == count // 8 * 8
        wait_for(server.idle)

    rounds(1000)
    before, files, tasks = process.memory_info().rss, process.num_fds(), process.num_threads()
    rounds(9000)
    assert process.memory_info().rss - before < 64 << 20
    assert process.num_fds() <= files + 4
    assert process.num_threads() <= tasks + 4


def test_what_the_document_allows(server):
    """Requests made from the OpenAPI document: no answer is a server's error or differs from the document."""
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    checks = [
        *(not_a_server_error, content_type_conformance, response_schema_conformance),
        status_code_conformance,
    ]
    seen = set()
    for operation in schema.get_all_operations():
        api = operation.ok()

        @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(case=api.as_strategy())
        def check(case):
            if isinstance(case.body, dict) and case.body.get("model"):
                # Otherwise nearly all of them would only be told that there is no such model.
                case.body["model"] = "tiny"
                case.body.pop("max_completion_tokens", None)
                if "completions" in case.operation.label:
                    # About half of them; left to chance, nearly none would be answered by events.
                    case.body["stream"] = len(str(case.body)) % 2 == 0
                if "max_tokens" in case.body or "messages" in case.body:
                    case.body["max_tokens"] = 2
            case.call_and_validate(checks=checks)

        check()
        seen.add(api.label)
    assert "POST /v1/chat/completions" in seen
