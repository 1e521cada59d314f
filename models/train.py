#!/usr/bin/env python3
"""Trains the byte-level Llama model that ships with kvrelay.

  models/train.py --text text/documents.jsonl --out models/bard-4m

Needs PyTorch, transformers and safetensors; matplotlib draws the loss if it is there. About two
minutes on one current GPU; `--steps 5 --batch 4 --context 128` is a trial run on a CPU.
collect_text.py says where the text comes from.

The network is written out below instead of taken from transformers because it needs dropout on the
residual branches (the text is seen some fifty times), and because it compiles to fewer kernels. Its
tensors have the names and the meaning that transformers gives them, and the script ends by loading
what it saved into transformers and comparing the logits.

Token ids: 0 begins a document (and pads), 1 ends it, 2 is unused, byte b is b + 3.
"""

import argparse
import json
import math
import os
import platform
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

BOS, EOS, FIRST_BYTE, VOCABULARY = 0, 1, 3, 259
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 256, 6, 8, 4, 32, 768
CONTEXT, THETA, EPSILON = 2048, 10000.0, 1e-5
HELD_OUT_EVERY = 25  # one document in 25 is never trained on


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=False)
        self.k_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.v_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)

    def forward(self, x, cos, sin):
        batch, length, _ = x.shape

        def heads(y, count):
            return y.view(batch, length, count, HEAD_DIM).transpose(1, 2)

        def rotate(y):
            # Dimension i pairs with dimension i + HEAD_DIM / 2, as in transformers.
            first, second = y.float().chunk(2, dim=-1)
            turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
            return turned.to(y.dtype)

        q = rotate(heads(self.q_proj(x), HEADS))
        k = rotate(heads(self.k_proj(x), KV_HEADS))
        v = heads(self.v_proj(x), KV_HEADS)
        k, v = (y.repeat_interleave(HEADS // KV_HEADS, dim=1) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v.to(q.dtype), is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, HEADS * HEAD_DIM))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
        self.up_proj = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
        self.down_proj = nn.Linear(INTERMEDIATE, HIDDEN, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.input_layernorm = Norm()
        self.self_attn = Attention()
        self.post_attention_layernorm = Norm()
        self.mlp = Mlp()
        self.dropout = dropout

    def forward(self, x, cos, sin):
        y = self.self_attn(self.input_layernorm(x), cos, sin)
        x = x + F.dropout(y, self.dropout, self.training)
        y = self.mlp(self.post_attention_layernorm(x))
        return x + F.dropout(y, self.dropout, self.training)


class Llama(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Layer(dropout) for _ in range(LAYERS))
        self.norm = Norm()
        self.dropout = dropout
        frequency = THETA ** (-torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
        angle = torch.outer(torch.arange(CONTEXT).float(), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                last_of_branch = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = 1 / math.sqrt(2 * LAYERS) if last_of_branch else 1
                nn.init.normal_(parameter, std=0.02 * scale)

    def forward(self, ids, targets=None):
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        x = F.dropout(self.embed_tokens(ids), self.dropout, self.training)
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits = F.linear(self.norm(x), self.embed_tokens.weight)
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def encode(text):
    return [byte + FIRST_BYTE for byte in text.encode()]


def load_text(path):
    """Token streams {name: ids}: "train", and one per source of held-out documents."""
    streams, count = {"train": []}, {}
    with open(path, encoding="utf-8") as f:
        for line in f:
            document = json.loads(line)
            source = document["source"]
            count[source] = count.get(source, 0) + 1
            held_out = count[source] % HELD_OUT_EVERY == HELD_OUT_EVERY // 2
            stream = streams.setdefault(source if held_out else "train", [])
            stream += [BOS] + encode(document["text"]) + [EOS]
    return {name: torch.tensor(ids, dtype=torch.int32) for name, ids in streams.items()}


class Windows:
    """Random training windows: a quarter begin with a document, a quarter with any line and BOS
    before it, the rest at any byte.

    So the model can begin a document, and continue text from the middle of one with BOS or without.
    """

    def __init__(self, stream, device, seed):
        self.stream = stream.to(device)
        self.beginnings = (self.stream == BOS).nonzero().flatten()
        self.newlines = (self.stream == ord("\n") + FIRST_BYTE).nonzero().flatten()
        self.generator = torch.Generator(device=device).manual_seed(seed)

    def below(self, limit, count):
        return torch.randint(limit, (count,), device=self.stream.device, generator=self.generator)

    def draw(self, batch, length):
        some = batch // 4
        start = torch.cat((
            self.beginnings[self.below(len(self.beginnings), some)],
            self.newlines[self.below(len(self.newlines), some)],
            self.below(len(self.stream), batch - 2 * some)))
        start = start.clamp(max=len(self.stream) - length - 1)
        window = self.stream[start[:, None] + torch.arange(length + 1, device=start.device)].long()
        window[: 2 * some, 0] = BOS
        return window[:, :-1], window[:, 1:]


@torch.no_grad()
def held_out_loss(logits_of, stream, device, context, autocast, batch=16):
    """Nats per token over `stream` in windows of `context`, and the same by position in them."""
    count = (len(stream) - 1) // context
    ids = stream[: count * context + 1].long()
    inputs, targets = ids[:-1].view(count, context), ids[1:].view(count, context)
    by_position = torch.zeros(context, dtype=torch.float64)
    for i in range(0, count, batch):
        with autocast():
            logits = logits_of(inputs[i : i + batch].to(device))
        wanted = targets[i : i + batch].to(device)
        loss = F.cross_entropy(logits.float().transpose(1, 2), wanted, reduction="none")
        by_position += loss.double().sum(0).cpu()
    by_position /= count
    return by_position.mean().item(), by_position


def save(model, folder):
    """Writes config.json, model.safetensors (bf16) and the tokenizer; returns the saved model."""
    from transformers import AutoModelForCausalLM, ByT5Tokenizer, GenerationConfig, LlamaConfig
    from transformers import LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM, max_position_embeddings=CONTEXT, rms_norm_eps=EPSILON,
        rope_parameters={"rope_type": "default", "rope_theta": THETA}, tie_word_embeddings=True,
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=BOS)
    hf = LlamaForCausalLM(config)
    weights = {"model." + name: t.detach().cpu() for name, t in model.state_dict().items()}
    missing, unexpected = hf.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
    hf.tie_weights()
    hf.to(torch.bfloat16)
    hf.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=BOS)
    hf.save_pretrained(folder)
    ByT5Tokenizer(extra_ids=0, bos_token="<pad>", model_max_length=CONTEXT).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def continue_text(hf, prompt, new_tokens, temperature, seed):
    torch.manual_seed(seed)
    ids = torch.tensor([[BOS] + encode(prompt)], device=hf.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {
        "do_sample": False}
    out = hf.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **sampling)
    ids = [i for i in out[0].tolist() if i >= FIRST_BYTE]
    return bytes(i - FIRST_BYTE for i in ids).decode(errors="replace")


def draw_plot(log, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5))
    axes.plot(*zip(*log["train_loss"]), label="training (dropout on)", linewidth=1)
    for name, points in log["held_out_loss"].items():
        axes.plot(*zip(*points), label="held out: " + name)
    axes.set_xlabel("step")
    axes.set_ylabel("nats per byte")
    axes.set_ylim(0.7, 2.0)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", required=True, help="documents.jsonl of collect_text.py")
    parser.add_argument("--out", required=True, help="folder of the model")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--minutes", type=float, default=0, help="if set, fewer steps to fit this")
    parser.add_argument("--batch", type=int, default=32, help="windows a step")
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=1611)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")

    def autocast():
        return torch.autocast(device, dtype=torch.bfloat16)

    streams = load_text(args.text)
    train = Windows(streams.pop("train"), device, args.seed)
    model = Llama(args.dropout).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters; {len(train.stream)} training tokens; held out "
          f"{ {name: len(s) for name, s in streams.items()} }", flush=True)
    decayed = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": args.decay}, {"params": others, "weight_decay": 0.0}],
        lr=args.rate, betas=(0.9, 0.95), fused=device == "cuda")

    def train_step(forward):
        ids, targets = train.draw(args.batch, args.context)
        with autocast():
            loss = forward(ids, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    forward = model
    if device == "cuda":
        forward = torch.compile(model)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        try:
            train_step(forward)
        except Exception as error:  # a compiler that does not work here costs time, not the run
            print("not compiled:", repr(error)[:300], flush=True)
            forward = model
            optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()

    log = {"train_loss": [], "held_out_loss": {name: [] for name in streams}}
    steps, warmup, best, best_state, best_step = args.steps, min(200, args.steps), math.inf, None, 0
    started, since, mark, total = time.time(), 0, 20, torch.zeros((), device=device)
    step = 0
    while step < steps:
        progress = step / max(1, steps)
        rate = args.rate * min(1, (step + 1) / warmup)
        rate *= 0.02 + 0.49 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        total += train_step(forward)
        step, since = step + 1, since + 1
        if args.minutes and step in (mark, 3 * mark):
            # The first steps are slow; the 40 after them tell how many fit.
            if device == "cuda":
                torch.cuda.synchronize()
            if step == mark:
                mark_time = time.time()
            else:
                pace = (time.time() - mark_time) / (2 * mark)
                steps = min(steps, step + int((args.minutes * 60 - (time.time() - started)) / pace))
                print(f"{1000 * pace:.1f} ms a step, {steps} steps", flush=True)
        every = 50
        if step % every == 0 or step == steps:
            log["train_loss"].append([step, round(total.item() / since, 4)])
            total, since = torch.zeros((), device=device), 0
        if step % 400 == 0 or step == steps:
            model.eval()
            losses = {name: held_out_loss(model, s, device, args.context, autocast)[0]
                      for name, s in streams.items()}
            model.train()
            for name, loss in losses.items():
                log["held_out_loss"][name].append([step, round(loss, 4)])
            print(f"step {step}, {time.time() - started:.0f} s: {log['train_loss'][-1][1]}, "
                  f"held out { {n: round(l, 4) for n, l in losses.items()} }", flush=True)
            if sum(losses.values()) <= best:
                best, best_step = sum(losses.values()), step
                best_state = {n: t.detach().clone() for n, t in model.state_dict().items()}
    seconds = time.time() - started

    model.load_state_dict(best_state)
    model.eval()
    os.makedirs(args.out, exist_ok=True)
    hf = save(model, args.out).to(device)

    # What was saved, in fp32: its loss, and that transformers agrees with the network above.
    torch.set_float32_matmul_precision("highest")
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
    final, position = {}, {}
    for name, stream in streams.items():
        loss, by_position = held_out_loss(
            lambda ids: hf(ids).logits, stream, device, args.context, lambda: torch.no_grad())
        final[name] = {
            "nats_per_byte": round(loss, 4), "bits_per_byte": round(loss / math.log(2), 4)}
        edges = [e for e in (0, 16, 128, 512, 1024, 1536, 2048) if e <= args.context]
        position[name] = {f"{a}-{b}": round(by_position[a:b].mean().item(), 4)
                          for a, b in zip(edges, edges[1:])}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
        ids = streams[list(streams)[0]][:512].long()[None].to(device)
        difference = (model(ids) - hf(ids).logits).abs().max().item()
    print("largest difference to transformers", difference, "loss", final, position, flush=True)
    assert difference < 1e-2, difference

    import transformers
    log = {
        "schema": 1, "parameters": parameters,
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__,
                      "python": platform.python_version(),
                      "device": torch.cuda.get_device_name() if device == "cuda" else "cpu"},
        "arguments": {k: v for k, v in vars(args).items() if k not in ("text", "out")},
        "steps": steps, "tokens_seen": steps * args.batch * args.context,
        "training_tokens": len(train.stream),
        "held_out_tokens": {name: len(s) for name, s in streams.items()},
        "seconds": round(seconds, 1), "saved_step": best_step, "saved_model": final,
        "saved_model_nats_by_position": position,
        "largest_logit_difference_to_transformers": difference, **log}
    with open(os.path.join(args.out, "training.json"), "w") as f:
        # One line a curve.
        f.write("{\n" + ",\n".join(f'  "{k}": {json.dumps(v)}' for k, v in log.items()) + "\n}\n")
    try:
        draw_plot(log, os.path.join(args.out, "loss.png"))
    except ImportError:
        print("no matplotlib, no plot")
    for prompt in ("HAMLET, PRINCE OF DENMARK\n\n", "Genesis 51\n\n", "And the LORD said unto"):
        for temperature in (0, 0.8):
            text = continue_text(hf, prompt, 300, temperature, 7)
            print(f"--- temperature {temperature}\n{text}")


if __name__ == "__main__":
    main()
