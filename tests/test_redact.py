"""Secrets are removed from text, and nothing else is."""

import time

import pytest

from tempering.utils.text import redact

KEY = "sk-proj-" + "abcDEF123456" * 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"--api-key {KEY} --epochs 3", "--api-key *** --epochs 3"),
        (f"Incorrect API key provided: {KEY}.", "Incorrect API key provided: ***."),
        ("['run', '--api-key', 'foo', '--token=bar']", "['run', '--api-key', '***', '--token=***']"),
        ("Authorization: Bearer abc.def-123=", "Authorization: Bearer ***"),
        ('{"Authorization": "Basic dXNlcjpwYXNz", "model": "m"}', '{"Authorization": "Basic ***", "model": "m"}'),
        ('{"api_key": "zzzz", "eos_token": "</s>"}', '{"api_key": "***", "eos_token": "</s>"}'),
        ("OPENAI_API_KEY=foo HF_TOKEN=bar python", "OPENAI_API_KEY=*** HF_TOKEN=*** python"),
        ("aws_secret_access_key=wJalr/abc of AKIAIOSFODNN7EXAMPLE", "aws_secret_access_key=*** of ***"),
        ("hf_abcdefghijklmnop ghp_" + "a1" * 18, "*** ***"),
        ("s3://key:se/cret@bucket/data", "s3://***@bucket/data"),
        ("https://user:p@ss@host:80/x?token=abc&page=2#f", "https://***@host:80/x?token=***&page=2#f"),
        ("https://b.s3/x?X-Amz-Signature=ab&X-Amz-Expires=9", "https://b.s3/x?X-Amz-Signature=***&X-Amz-Expires=9"),
    ],
)
def test_secrets_are_replaced_and_what_surrounds_them_stays(text: str, expected: str) -> None:
    assert redact(text) == expected
    assert redact(expected) == expected


def test_harmless_text_stays() -> None:
    for text in (
        "max_new_tokens=5, token: 3, --tokenizer gpt2 --token-budget 4, key=3",
        "http://localhost:8000/v1/completions refused the request: 404 Not Found",
        "task-level sk-learn, a Bearer token, PWD=/data, ada@example.org, file:///data/x",
    ):
        assert redact(text) == text


def test_known_secrets_are_found_in_any_text_also_percent_encoded() -> None:
    assert redact("of my-pa ss: my-pa%20ss, my-pa", ["my-pa ss", "my-pa", ""]) == "of ***: ***, ***"


def test_a_long_text_takes_linear_time() -> None:
    start = time.process_time()
    for part in ("a-", "x", "://", "key=", "https://a:", "Bearer "):
        redact(part * (50_000 // len(part)))
    assert time.process_time() - start < 5
