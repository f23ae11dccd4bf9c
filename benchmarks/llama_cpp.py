"""`python -m benchmarks.llama_cpp RUN --python PYTHON`: exported GGUF files in llama.cpp itself, against our answers.

RUN is a run (or an adapter) on the embedded world's LLM that trained norms, connector or both. Its LLM is written as a
GGUF file (F32, and matrices in Q8_0 with --quantized), `normtune export --format gguf` puts the adapter in and writes
mmproj.gguf, and llama.cpp, as the package xllamacpp of PYTHON's environment has it, answers questions about images of
the encoder's size (others it would resize by its own rule). Reported: equal greedy answers, and how far
log-probabilities of first tokens are apart, for the tuned files and, to show that it matters, for the base's file with
the same mmproj.

The world's tokenizer (whole words) is none of llama.cpp's: the file's tokens are named <t0>, <t1>, ... and prompts are
written with those names, so that both sides read the same ids.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.standalone import QUESTIONS, images_of

TOKENS = 16
IMAGE = "<__media__>"

THERE = """
import json, sys, urllib.request
import xllamacpp as x

asked = json.load(open(sys.argv[1]))
params = x.CommonParams()
params.model.path, params.mmproj.path = sys.argv[3:5]
params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 1024, 1, False, -1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.port = 0
server = x.Server(params)

def call(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    head = {"Content-Type": "application/json"}
    address = server.listening_address.rstrip("/")
    with urllib.request.urlopen(urllib.request.Request(address + path, data, head)) as reply:
        return json.load(reply)

mark = call("/props").get("media_marker", "<__media__>")
answers = []
for prompt in asked["prompts"]:
    text = prompt["text"].replace("<__media__>", mark)
    body = {"temperature": 0.0, "n_predict": asked["tokens"], "return_tokens": True, "n_probs": 5,
            "cache_prompt": False, "prompt": {"prompt_string": text, "multimodal_data": [prompt["image"]]}}
    answers.append(call("/completion", body))
json.dump({"version": x.__version__, "answers": answers}, open(sys.argv[2], "w"))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="run or adapter folder on the embedded world's LLM, embedding and head not trained")
    parser.add_argument("--python", type=Path, required=True, help="of an environment with xllamacpp")
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--quantized", action="store_true", help="matrices of the LLM in Q8_0")
    parser.add_argument("--half", action="store_true", help="the encoder in F16, as by default, not F32")
    parser.add_argument("--keep", type=Path, help="folder for the files")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(arguments, arguments.keep or Path(temporary))
    print(json.dumps(result, indent=2))


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    base, out = folder / "base.gguf", folder / "out"
    write_llm(base, arguments.quantized)
    command = [sys.executable, "-m", "normtune", "export", arguments.run, "--format", "gguf", "--gguf", str(base)]
    wide = [] if arguments.half else ["--dtype", "float32"]
    subprocess.run([*command, *wide, "--out", str(out)], check=True)
    prompts, ours = here(arguments.run, arguments.count)
    asked, given, script = folder / "asked.json", folder / "given.json", folder / "there.py"
    mmproj = str(out / "mmproj.gguf")
    models = {"tuned": [str(out / "base-tuned.gguf"), mmproj], "base": [str(base), mmproj]}
    asked.write_text(json.dumps({"prompts": prompts, "tokens": TOKENS}))
    script.write_text(THERE)
    result: dict[str, Any] = {"questions": len(prompts), "quantized": arguments.quantized, "half": arguments.half}
    for name, files in models.items():
        subprocess.run([str(arguments.python), str(script), str(asked), str(given), *files], check=True)
        theirs = json.loads(given.read_text())
        result |= {"xllamacpp": theirs["version"], name: compared(ours, theirs["answers"])}
    return result


def compared(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """Equal answers, and the largest and mean distance of the first token's log-probabilities over their top five."""
    same, gaps = 0, []
    for own, other in zip(ours, theirs, strict=True):
        length = len(own["tokens"])
        ends = length == TOKENS or other["tokens"][length : length + 1] in ([], own["stops"])
        same += ends and own["tokens"] == other["tokens"][:length]
        top = other["completion_probabilities"][0]["top_logprobs"]
        gaps += [abs(row["logprob"] - own["log_probabilities"][row["id"]]) for row in top]
    return {"same": same, "log_probability_gap": {"mean": float(np.mean(gaps)), "largest": float(np.max(gaps))}}


def here(run: str, count: int) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    """Prompts for llama.cpp, and our greedy tokens and first log-probabilities."""
    import torch
    from PIL import Image

    from normtune.tuned import open_tuned

    tuned = open_tuned(run)
    model, processor = tuned.model.eval(), tuned.processor
    size = model.config.vision_config.image_size
    prompts, answers = [], []
    for number, path in enumerate(images_of(None, count)):
        image = Image.open(path).convert("RGB").resize((size, size))
        content = [{"type": "image"}, {"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=image, text=text, return_tensors="pt", add_special_tokens=False)
        ids = inputs["input_ids"][0].tolist()
        with torch.no_grad():
            first = model(**inputs).logits[0, -1].log_softmax(-1)
            made = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, len(ids) :].tolist()
        stops = [processor.tokenizer.convert_tokens_to_ids("<|end|>")]
        made = made[: next((i for i, token in enumerate(made) if token in stops), len(made))]
        mark = model.config.image_token_id
        place = ids.index(mark)
        words = [f"<t{i}>" for i in ids if i != mark]
        raw = io.BytesIO()
        image.save(raw, "PNG")
        prompt = "".join([*words[:place], IMAGE, *words[place:]])
        prompts.append({"text": prompt, "image": base64.b64encode(raw.getvalue()).decode()})
        answers.append({"tokens": made, "stops": stops, "log_probabilities": first.tolist()})
    return prompts, answers


def write_llm(path: Path, quantized: bool) -> None:
    """The embedded world's Llama as llama.cpp's converter writes one, but for the names of its tokens."""
    import gguf
    from transformers import AutoModelForCausalLM

    from normtune.world import resolve_path

    model = AutoModelForCausalLM.from_pretrained(resolve_path("world:llm")).float()
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<t{i}>" for i in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([int(gguf.TokenType.USER_DEFINED)] * config.vocab_size)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_unk_token_id(1)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    kind = gguf.GGMLQuantizationType.Q8_0 if quantized else gguf.GGMLQuantizationType.F32
    for name, parameter in model.named_parameters():
        value = parameter.detach().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # pairs of a rotation stand side by side there
            halves = value.reshape(config.num_attention_heads, 2, config.head_dim // 2, -1)
            value = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(value.shape)
        own = kind if value.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(table.get_name(name, (".weight",)), gguf.quantize(value, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
