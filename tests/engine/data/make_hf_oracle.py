#!/usr/bin/env python3
"""Makes the token ids that the engine must reproduce, with Hugging Face transformers.

  tests/engine/data/make_hf_oracle.py    # needs torch, transformers and safetensors; two minutes

Writes the tiny random-weight models tests/engine/data/tiny-*/ and hf_expected.json beside them:

  {"schema": 1, "made_with": {...}, "models": {folder: what it is for},
   "cases": [{"model": folder from the root of the repository, "name": ..., "prompt": [ids],
              "expected": [the ids that greedy decoding adds, eos like any other],
              "min_gap": smallest distance between the two best logits on the way}]}

Arithmetic is fp32 on the CPU; weights stored in bf16 or fp16 are widened. Each case is decoded with
a KV cache and PyTorch's fused attention, then its whole sequence is computed again in one pass with
transformers' own unfused attention; both must choose the same ids, and the two best logits are
never closer than MIN_GAP, so an implementation that sums in another order has no excuse.

Everything is drawn from SEED. Random weights are tried with one seed after the other until no
answer is degenerate; the seed that was taken is in "models".
"""

import json
import os
import shutil
import types

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

SEED = 20240607
MIN_GAP = 1e-3
HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(HERE)))
BUNDLED = "models/bard-4m"

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}

# spelling: of config.json, as transformers 4 or 5 writes it; "llama1" is 4 without the fields that
# the first Llama models lacked (num_key_value_heads, rope_theta, head_dim).
TINY = [
    {"name": "tiny-gqa", "why": "2 KV heads for 4 query heads, untied head, fp32",
     "heads": 4, "kv_heads": 2, "dtype": "float32", "spelling": 5},
    {"name": "tiny-mqa", "why": "1 KV head for 4 query heads, bf16",
     "heads": 4, "kv_heads": 1, "dtype": "bfloat16", "spelling": 4},
    {"name": "tiny-mha", "why": "as many KV heads as query heads, config.json of the first Llama",
     "heads": 4, "kv_heads": 4, "dtype": "bfloat16", "spelling": "llama1"},
    {"name": "tiny-head-dim", "why": "heads * head_dim = 64, hidden 40; 3 layers, odd sizes",
     "heads": 4, "kv_heads": 2, "head_dim": 16, "hidden": 40, "intermediate": 72, "layers": 3,
     "vocab": 83, "dtype": "bfloat16", "spelling": 4},
    {"name": "tiny-llama3-v4", "why": "llama3 rope scaling as in transformers 4",
     "heads": 4, "kv_heads": 2, "head_dim": 16, "theta": 10000.0, "rope": LLAMA3,
     "dtype": "bfloat16", "spelling": 4},
    {"name": "tiny-llama3-v5", "why": "llama3 rope scaling as in transformers 5, theta 500000",
     "heads": 4, "kv_heads": 4, "head_dim": 16, "theta": 500000.0, "rope": LLAMA3,
     "dtype": "bfloat16", "spelling": 5},
    {"name": "tiny-tied", "why": "the head is the embedding and is not stored; 8 KV heads",
     "heads": 8, "kv_heads": 8, "hidden": 48, "head_dim": 8, "tied": True, "dtype": "bfloat16",
     "spelling": 5},
    {"name": "tiny-sharded-bf16", "why": "three safetensors files and an index; layers cut across",
     "heads": 8, "kv_heads": 4, "layers": 3, "head_dim": 8, "vocab": 101, "shards": 3,
     "dtype": "bfloat16", "spelling": 4},
    {"name": "tiny-fp16", "why": "fp16 weights, theta 1000, eps 1e-6",
     "heads": 4, "kv_heads": 2, "theta": 1000.0, "eps": 1e-6, "dtype": "float16", "spelling": 5},
    {"name": "tiny-bias", "why": "Llama with attention_bias and mlp_bias",
     "heads": 4, "kv_heads": 2, "bias": True, "dtype": "bfloat16", "spelling": 5},
    {"name": "tiny-mistral", "why": "Mistral, all layers with a window of 24 tokens",
     "type": "mistral", "heads": 4, "kv_heads": 2, "window": 24, "dtype": "bfloat16",
     "spelling": 4},
    {"name": "tiny-qwen2", "why": "Qwen2: Q, K and V with biases; the second of 2 layers with a "
     "window of 20 tokens, by max_window_layers",
     "type": "qwen2", "heads": 4, "kv_heads": 2, "window": 20, "full_layers": 1,
     "dtype": "bfloat16", "spelling": 4},
    {"name": "tiny-qwen3", "why": "Qwen3: norms of Q's and K's heads, of which 4 * 16 are not the "
     "hidden 32; tied; the second of 2 layers with a window of 40 tokens, by layer_types",
     "type": "qwen3", "heads": 4, "kv_heads": 4, "head_dim": 16, "window": 40, "full_layers": 1,
     "tied": True, "theta": 1000000.0, "dtype": "bfloat16", "spelling": 5},
    {"name": "tiny-deepseek", "why": "DeepSeek-V2, dense: latents of queries and of keys and values, "
     "a decoupled rotary part; all its widths differ; 3 layers",
     "type": "deepseek_v2", "heads": 4, "kv_heads": 4, "hidden": 48, "layers": 3,
     "mla": {"q_lora_rank": 20, "kv_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
             "v_head_dim": 10},
     "dtype": "bfloat16", "spelling": 5},
    {"name": "tiny-deepseek-lite", "why": "DeepSeek-V2-Lite, dense: queries without a latent",
     "type": "deepseek_v2", "heads": 4, "kv_heads": 4, "theta": 1000.0,
     "mla": {"q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
             "v_head_dim": 8},
     "dtype": "bfloat16", "spelling": 4},
]
DEFAULTS = {"hidden": 32, "intermediate": 64, "layers": 2, "vocab": 96, "theta": 10000.0,
            "eps": 1e-5, "head_dim": 0, "tied": False, "shards": 1, "rope": None, "positions": 512,
            "type": "llama", "bias": False, "window": None, "full_layers": 0, "mla": None}
NAMES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3",
         "deepseek_v2": "DeepseekV2"}
TINY_PROMPTS = (1, 15, 48, 150)
TINY_NEW = 32

BUNDLED_LENGTHS = (15, 16, 17, 100, 300, 600, 1900)
BUNDLED_TEXTS = {
    "bible": "Psalms 151\n\n  1 ",
    "play": "HAMLET, PRINCE OF DENMARK\n\nACT III.\n\nSCENE I. A room in the Castle.\n\n",
    "not ascii": "Thou na\u00efve \u0152dipus \u2014 speak: ",
    "no bos": "And it came to pass, that when the king of",
}
BUNDLED_NEW = 64


def architecture(m):
    return NAMES[m["type"]] + "ForCausalLM"


def switches(m):
    """The fields by which the members of the family differ; both spellings write them alike."""
    if m["type"] == "llama":
        return {"attention_bias": m["bias"], "mlp_bias": m["bias"]}
    if m["type"] == "mistral":
        return {"sliding_window": m["window"]}
    if m["mla"]:
        return dict(m["mla"], first_k_dense_replace=m["layers"])
    return {"use_sliding_window": m["window"] is not None, "sliding_window": m["window"],
            "max_window_layers": m["full_layers"]}


def config_of(m):
    """The configuration as transformers holds it."""
    rope = dict(m["rope"] or {"rope_type": "default"}, rope_theta=m["theta"])
    return getattr(transformers, NAMES[m["type"]] + "Config")(
        vocab_size=m["vocab"], hidden_size=m["hidden"], intermediate_size=m["intermediate"],
        num_hidden_layers=m["layers"], num_attention_heads=m["heads"],
        num_key_value_heads=m["kv_heads"],
        max_position_embeddings=m["positions"], rms_norm_eps=m["eps"], rope_parameters=rope,
        tie_word_embeddings=m["tied"], bos_token_id=0, eos_token_id=1,
        architectures=[architecture(m)], dtype=m["dtype"], **switches(m),
        # Qwen2's own configuration does not have the field, DeepSeek's derives it.
        **({"head_dim": m["head_dim"] or m["hidden"] // m["heads"]}
           if m["type"] not in ("qwen2", "deepseek_v2") else {}))


def write_config(m, folder):
    if m["spelling"] == 5:
        config_of(m).save_pretrained(folder)
        return
    fields = {
        "architectures": [architecture(m)], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 0, "eos_token_id": 1, "head_dim": m["head_dim"], "hidden_act": "silu",
        "hidden_size": m["hidden"], "initializer_range": 0.02,
        "intermediate_size": m["intermediate"], "max_position_embeddings": m["positions"],
        "mlp_bias": False, "model_type": m["type"], "num_attention_heads": m["heads"],
        "num_hidden_layers": m["layers"], "num_key_value_heads": m["kv_heads"],
        "pretraining_tp": 1, "rms_norm_eps": m["eps"], "rope_scaling": m["rope"],
        "rope_theta": m["theta"], "tie_word_embeddings": m["tied"], "torch_dtype": m["dtype"],
        "transformers_version": "4.46.0", "use_cache": True, "vocab_size": m["vocab"]}
    absent = [] if m["head_dim"] else ["head_dim"]
    if m["type"] != "llama":
        absent += ["attention_bias", "mlp_bias", "pretraining_tp", "rope_scaling"]
    if m["spelling"] == "llama1":
        assert m["heads"] == m["kv_heads"] and m["theta"] == 10000.0 and not m["rope"]
        absent += ["num_key_value_heads", "rope_theta", "rope_scaling", "attention_bias",
                   "attention_dropout", "mlp_bias"]
        fields["transformers_version"] = "4.28.0"
    for name in set(absent):
        del fields[name]
    fields.update({name: value for name, value in switches(m).items() if m["spelling"] == 4})
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(fields, f, indent=2)
        f.write("\n")


def random_weights(m, seed):
    """Weights large enough that attention looks around and answers vary."""
    g = torch.Generator().manual_seed(seed)
    head_dim = m["head_dim"] or m["hidden"] // m["heads"]
    queries, keys = m["heads"] * head_dim, m["kv_heads"] * head_dim
    hidden, inner = m["hidden"], m["intermediate"]

    def matrix(rows, columns, gain):
        return torch.randn(rows, columns, generator=g) * (gain / columns**0.5)

    def norm(width=hidden):
        return 1 + 0.2 * torch.randn(width, generator=g)

    def bias(width):
        return 0.5 * torch.randn(width, generator=g)

    def attention(prefix):
        a = prefix + "self_attn."
        if not m["mla"]:
            return {
                a + "q_proj.weight": matrix(queries, hidden, 1.7),
                a + "k_proj.weight": matrix(keys, hidden, 1.7),
                a + "v_proj.weight": matrix(keys, hidden, 1.5),
                a + "o_proj.weight": matrix(hidden, queries, 1.5),
            }
        mla = types.SimpleNamespace(**m["mla"])
        queries_of = m["heads"] * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
        made = m["heads"] * (mla.qk_nope_head_dim + mla.v_head_dim)
        values = m["heads"] * mla.v_head_dim
        q = {a + "q_proj.weight": matrix(queries_of, hidden, 1.7)}
        if mla.q_lora_rank:
            q = {
                a + "q_a_proj.weight": matrix(mla.q_lora_rank, hidden, 1.0),
                a + "q_a_layernorm.weight": norm(mla.q_lora_rank),
                a + "q_b_proj.weight": matrix(queries_of, mla.q_lora_rank, 1.7),
            }
        return q | {
            a + "kv_a_proj_with_mqa.weight":
                matrix(mla.kv_lora_rank + mla.qk_rope_head_dim, hidden, 1.7),
            a + "kv_a_layernorm.weight": norm(mla.kv_lora_rank),
            a + "kv_b_proj.weight": matrix(made, mla.kv_lora_rank, 1.7),
            a + "o_proj.weight": matrix(hidden, values, 1.5),
        }

    # A tied head echoes the last token unless the layers outweigh the embedding.
    weights = {"model.embed_tokens.weight": matrix(m["vocab"], hidden, 1.0 if m["tied"] else 3.0)}
    for i in range(m["layers"]):
        layer = f"model.layers.{i}."
        weights.update({
            layer + "input_layernorm.weight": norm(),
            **attention(layer),
            layer + "post_attention_layernorm.weight": norm(),
            layer + "mlp.gate_proj.weight": matrix(inner, hidden, 1.5),
            layer + "mlp.up_proj.weight": matrix(inner, hidden, 1.5),
            layer + "mlp.down_proj.weight": matrix(hidden, inner, 1.5),
        })
        if m["bias"] or m["type"] == "qwen2":
            weights.update({layer + f"self_attn.{n}_proj.bias": bias(width)
                            for n, width in (("q", queries), ("k", keys), ("v", keys))})
        if m["bias"]:
            weights.update({
                layer + "self_attn.o_proj.bias": bias(hidden),
                layer + "mlp.gate_proj.bias": bias(inner),
                layer + "mlp.up_proj.bias": bias(inner),
                layer + "mlp.down_proj.bias": bias(hidden),
            })
        if m["type"] == "qwen3":
            weights.update({layer + f"self_attn.{n}_norm.weight": norm(head_dim) for n in "qk"})
    weights["model.norm.weight"] = norm()
    if not m["tied"]:
        weights["lm_head.weight"] = matrix(m["vocab"], hidden, 3.0)
    dtype = getattr(torch, m["dtype"])
    return {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}


def write_weights(m, weights, folder):
    if m["shards"] == 1:
        save_file(weights, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
        return
    # Cut the list of names anywhere, so that one layer's tensors lie in different files.
    names = list(weights)
    size = -(-len(names) // m["shards"])
    place = {}
    for shard in range(m["shards"]):
        file = f"model-{shard + 1:05d}-of-{m['shards']:05d}.safetensors"
        part = names[shard * size : (shard + 1) * size]
        path = os.path.join(folder, file)
        save_file({n: weights[n] for n in part}, path, metadata={"format": "pt"})
        place.update({n: file for n in part})
    total = sum(t.numel() * t.element_size() for t in weights.values())
    with open(os.path.join(folder, "model.safetensors.index.json"), "w") as f:
        json.dump({"metadata": {"total_size": total}, "weight_map": place}, f, indent=1)
        f.write("\n")


def load(folder, attention):
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@torch.no_grad()
def greedy(cached, whole, prompt, new_tokens):
    """(ids, smallest gap); ids is None if the two ways of computing differ."""
    ids = torch.tensor([prompt])
    out = cached.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens,
                          do_sample=False, output_logits=True, return_dict_in_generate=True)
    expected = out.sequences[0, len(prompt):].tolist()
    assert len(expected) == new_tokens
    at_once = whole(out.sequences[:, :-1]).logits[0, len(prompt) - 1:]
    gap = float("inf")
    for logits in (torch.cat(out.logits), at_once):
        best = logits.topk(2, dim=-1)
        gap = min(gap, (best.values[:, 0] - best.values[:, 1]).min().item())
        if best.indices[:, 0].tolist() != expected:
            return None, gap
    return expected, gap


def varied(ids):
    """No constant and no short cycle at the end."""
    return len(set(ids)) >= 8 and all(ids[-12:] != ids[-12 - p : -p] for p in range(1, 8))


def tiny_cases(m, index):
    folder = os.path.join(HERE, m["name"])
    for attempt in range(1000):
        seed = SEED + 1000 * index + attempt
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        write_config(m, folder)
        weights = random_weights(m, seed)
        write_weights(m, weights, folder)
        cached, whole = load(folder, "sdpa"), load(folder, "eager")
        check_loaded(m, cached, weights)
        g = torch.Generator().manual_seed(seed)
        cases = []
        for length in TINY_PROMPTS:
            prompt = torch.randint(2, m["vocab"], (length,), generator=g).tolist()
            expected, gap = greedy(cached, whole, prompt, TINY_NEW)
            if expected is None or gap < MIN_GAP or not varied(expected):
                break
            cases.append({"model": os.path.relpath(folder, ROOT), "name": f"{length} tokens",
                          "prompt": prompt, "expected": expected, "min_gap": round(gap, 6)})
        if len(cases) == len(TINY_PROMPTS) and all_matters(m, weights, cases):
            return cases, seed
    raise SystemExit(f"{m['name']}: no seed gives varied answers")


def check_loaded(m, model, weights):
    """transformers understood config.json and the files as they are meant."""
    meant, got = config_of(m), model.config
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                  "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps",
                  "tie_word_embeddings", "rope_parameters", "attention_bias", "mlp_bias",
                  "sliding_window", "layer_types", "q_lora_rank", "kv_lora_rank",
                  "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "first_k_dense_replace"):
        want, have = getattr(meant, field, None), getattr(got, field, None)
        assert want == have, (m["name"], field, want, have)
    state = model.state_dict()
    for name, tensor in weights.items():
        assert torch.equal(state[name], tensor.float()), (m["name"], name)


def all_matters(m, weights, cases):
    """Without what is special about the model the longer answers differ: a test with these ids
    notices when it is missing."""
    longer = [c for c in cases if len(c["prompt"]) > 1]
    if (m["rope"] or m["theta"] != DEFAULTS["theta"]) and not differ(
            dict(m, rope=None, theta=DEFAULTS["theta"]), weights, longer):
        return False
    if m["window"] and not differ(dict(m, window=None), weights,
                                  [c for c in cases if len(c["prompt"]) > m["window"]]):
        return False
    if m["mla"]:  # of which nothing can be left out
        return differ(dict(m, theta=m["theta"] * 10), weights, longer)
    special = m["bias"] or m["type"] != "llama"
    return not special or differ(dict(m, type="llama", bias=False), weights, longer)


def differ(m, weights, cases):
    """Whether a model of configuration `m` answers each of the cases otherwise."""
    other = getattr(transformers, architecture(m))(config_of(m)).float().eval()
    names = set(other.state_dict())
    other.load_state_dict({n: t.float() for n, t in weights.items() if n in names},
                          strict=not m["tied"])
    other.generation_config.eos_token_id = None
    other.generation_config.pad_token_id = 0
    return all(greedy(other, other, c["prompt"], TINY_NEW)[0] != c["expected"] for c in cases)


def bundled_cases():
    cached, whole = (load(os.path.join(ROOT, BUNDLED), a) for a in ("sdpa", "eager"))
    prompts = [("1 token", [0])]
    for name, text in BUNDLED_TEXTS.items():
        prompts.append((name, [0] * (name != "no bos") + [b + 3 for b in text.encode()]))
    # Longer prompts are the model's own words, so that they are like what it was trained on.
    torch.manual_seed(SEED)
    sample = cached.generate(torch.tensor([[0]]), attention_mask=torch.ones(1, 1, dtype=torch.long),
                             max_new_tokens=max(BUNDLED_LENGTHS) - 1, do_sample=True,
                             temperature=0.8, top_k=0)[0].tolist()
    prompts += [(f"{n} tokens", sample[:n]) for n in BUNDLED_LENGTHS]
    cases = []
    for name, prompt in prompts:
        expected, gap = greedy(cached, whole, prompt, BUNDLED_NEW)
        assert expected is not None and gap >= MIN_GAP, (name, gap)
        text = bytes(i - 3 for i in expected if i >= 3).decode(errors="replace")
        cases.append({"model": BUNDLED, "name": name, "prompt": prompt, "expected": expected,
                      "text": text, "min_gap": round(gap, 6)})
    return cases


def main():
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    cases, models = bundled_cases(), {BUNDLED: "the model that ships with the project"}
    for index, overrides in enumerate(TINY):
        m = dict(DEFAULTS, **overrides)
        more, seed = tiny_cases(m, index)
        cases += more
        models[more[0]["model"]] = f"{m['why']} (seed {seed})"
        print(m["name"], "seed", seed, "smallest gap", min(c["min_gap"] for c in more), flush=True)
    made_with = {"script": "make_hf_oracle.py", "transformers": transformers.__version__,
                 "torch": torch.__version__, "seed": SEED, "arithmetic": "fp32 on the CPU"}
    with open(os.path.join(HERE, "hf_expected.json"), "w") as f:
        # One line a case.
        f.write('{"schema": 1,\n"made_with": ' + json.dumps(made_with) + ',\n"models": '
                + json.dumps(models, indent=1) + ',\n"cases": [\n'
                + ",\n".join(json.dumps(c) for c in cases) + "\n]}\n")
    print(len(cases), "cases; smallest gap", min(c["min_gap"] for c in cases))


if __name__ == "__main__":
    main()
