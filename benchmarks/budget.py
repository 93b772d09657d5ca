"""How well measured costs of formats choose a recipe for a number of bytes, on a real small model.

Question: on SmolLM2-135M-Instruct, does the estimate order recipes as their KL divergence does, and
how much less is lost by the recipe that it chooses in the bytes of the library's recipes?

Method: the costs are measured on text of the package (`quantize.sensitivity`), here and below with
inputs rounded as the formats declare. Forty recipes are drawn, half with a random share of NVFP4,
half in the bytes of `medium-3.5`, within one group. Each is scored on windows of the held-out
text: all of them pass through a layer side by side, every group encoded once per format by maxima,
keys and values as they are. Scored likewise are the library's recipes and what the budget chooses
in their bytes. Divergences are from the FP8 source with its inputs left alone. Peers of the
estimate in the same record: how large a group's error is in the residual stream behind its layer,
and the same times how a small random error grows from there to the end. What stages have found is
kept in --work and taken again. No clock is read: load does not matter.

Reading the result: at the bytes of NVFP4 everywhere a tied model leaves no choice, since its
embedding stays bf16 and everything else is as small as can be; so the untied twin, whose head is a
copy of the embedding, says what the bytes of a head in bf16 can buy. Large models have a head of
their own, so the twin is nearer to them, in its head's share of the bytes farther (three tenths
here, three hundredths there). A rank correlation over recipes of unlike size is helped by size; the
one over recipes of one size is not.

Last record: benchmarks/records/budget.json.

Run: PYTHONPATH=src python benchmarks/budget.py && python -m tools.docs
"""

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from halfbyte import log
from halfbyte.bench import record
from halfbyte.calibrate.stream import READERS
from halfbyte.calibrate.tokens import builtin_rows
from halfbyte.checkpoint.gguf import import_gguf, packaged_file
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.fidelity.models import full_divergence
from halfbyte.fidelity.windows import cut_texts, read_texts
from halfbyte.figures import Against, Figure
from halfbyte.kernels import reference
from halfbyte.model.rope import RotaryTable
from halfbyte.modules import WeightFormat
from halfbyte.quantize.encode import SourceWeight
from halfbyte.quantize.fp8_source import make_fp8_source
from halfbyte.quantize.groups import Group, unmeasured_groups
from halfbyte.quantize.knapsack import Item, choose
from halfbyte.quantize.layer import read_weight
from halfbyte.quantize.losses import encoded_weight, rounder
from halfbyte.quantize.scales import shared_maxima
from halfbyte.quantize.sensitivity import Measuring, measure_sensitivity, some_rows
from halfbyte.recipe.plan import make_plan
from halfbyte.recipe.schema import load_recipe

RECORD = Path(__file__).parent / "records" / "budget.json"
HELD_OUT = Path(__file__).parents[1] / "src/halfbyte/fidelity/data/held_out.txt"
CARD, EVERYWHERE = "medium-3.5", "nvfp4-everywhere"
RECIPES = 40

Formats = Mapping[str, WeightFormat]  # first member of a group -> its format


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/budget"))
    parser.add_argument("--tokens", type=int, default=1536, help="that costs are measured on")
    parser.add_argument("--window", type=int, default=128, help="tokens of a scored window")
    parser.add_argument("--windows", type=int, default=2, help="scored windows")
    parser.add_argument("--out", type=Path, default=RECORD)
    return parser.parse_args()


def cached(args: argparse.Namespace, name: str, make: Any) -> Any:
    """What a stage found, kept in --work: a run that was killed goes on with the next stage."""
    path: Path = args.work / f"{name}.json"
    if not path.exists():
        found = make()
        path.write_text(json.dumps(found), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def sources(args: argparse.Namespace) -> tuple[Checkpoint, Checkpoint]:
    """The FP8 source, and its twin with a head of its own."""
    args.work.mkdir(parents=True, exist_ok=True)
    bf16, fp8, untied = (args.work / name for name in ("bf16", "fp8", "untied"))
    if not fp8.exists():
        if not bf16.exists():
            import_gguf(packaged_file("smollm2"), bf16)
        make_fp8_source(bf16, fp8)
    if not untied.exists():
        untie(fp8, untied)
    return Checkpoint.open(fp8), Checkpoint.open(untied)


def untie(tied: Path, untied: Path) -> None:
    """Write the same model with its embedding stored a second time, as the head."""
    from safetensors.torch import load_file, save_file

    untied.mkdir()
    tensors = load_file(tied / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, untied / "model.safetensors", {"format": "pt"})
    config = json.loads((tied / "config.json").read_text(encoding="utf-8"))
    config["tie_word_embeddings"] = False
    (untied / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (untied / name).write_bytes((tied / name).read_bytes())


def measured(args: argparse.Namespace, checkpoint: Checkpoint) -> list[Group]:
    """Every group with its costs; beside them the largest input that each linear reads."""
    directory = checkpoint.directory
    rows = some_rows(builtin_rows(directory, samples=64, tokens_per_sample=512), args.tokens)
    return measure_sensitivity(
        Measuring(
            checkpoint,
            rows,
            {"builtin": args.tokens},
            {"name": directory.name},
            args.work / f"sensitivity-{directory.name}.json",
        ),
        on_step=lambda done, total: print(f"cost {done} of {total}", flush=True),
    )


def windows_of(args: argparse.Namespace, checkpoint: Checkpoint) -> Tensor:
    """Evenly spaced whole windows of the held-out text, int64 (W, T)."""
    cut, _ = cut_texts(checkpoint.directory, read_texts(HELD_OUT), args.window, None)
    whole = [window for window in cut if len(window) == args.window]
    step = max(1, len(whole) // args.windows)
    return torch.tensor(whole[::step][: args.windows])


def random_recipes(groups: Sequence[Group], card: Formats) -> list[dict[str, WeightFormat]]:
    """Half of any size, half as large as the card's recipe or a little less."""
    generator = random.Random(0)
    names = [group.members[0] for group in groups]
    recipes: list[dict[str, WeightFormat]] = []
    for _ in range(RECIPES // 2):
        share = generator.uniform(0.05, 0.95)
        recipes.append({n: "nvfp4" if generator.random() < share else "fp8" for n in names})
    wanted = num_bytes(groups, card)
    while len(recipes) < RECIPES:
        order = list(names)
        generator.shuffle(order)
        recipe: dict[str, WeightFormat] = dict.fromkeys(order, "fp8")
        for name in order:
            if num_bytes(groups, recipe) <= wanted:
                break
            recipe[name] = "nvfp4"
        recipes.append(recipe)
    return recipes


def num_bytes(groups: Sequence[Group], formats: Formats) -> int:
    """Bytes of all groups under these formats."""
    return sum(group.sizes[formats[group.members[0]]] for group in groups)


def library(name: str, checkpoint: Checkpoint, groups: Sequence[Group]) -> Formats:
    """The formats of a recipe of the library, group by group."""
    formats = make_plan(load_recipe(name), checkpoint.config).formats
    return {group.members[0]: formats.get(group.members[0], "bf16") for group in groups}


def budgeted(groups: Sequence[Group], room: int) -> tuple[Formats, dict[str, Any]]:
    """What the budget chooses in so many bytes, and what it says of that."""
    items = [Item(group.members[0], group.sizes, group.losses) for group in groups]  # type: ignore[arg-type]
    made = choose(items, room)
    facts = {
        "bytes": made.num_bytes,
        "room": room,
        "estimate": made.loss,
        "lower_bound": made.lower_bound,
        "gap": made.gap,
        "groups": {k: sum(v == k for v in made.options.values()) for k in ("bf16", "fp8", "nvfp4")},
    }
    return made.options, facts  # type: ignore[return-value]


class Side:
    """Models side by side: one checkpoint under several recipes, a layer at a time.

    The first of them is the source as it is. Shapes: R recipes, T tokens of all windows, D width.
    """

    def __init__(self, checkpoint: Checkpoint, ids_WT: Tensor, recipes: Sequence[Formats]) -> None:
        self.checkpoint = checkpoint
        self.text = checkpoint.config.text
        self._ids_WT = ids_WT
        self._recipes: list[Formats | None] = [None, *recipes]
        self._rotation = RotaryTable(self.text).at(
            torch.arange(ids_WT.shape[1]).repeat(ids_WT.shape[0])
        )

    @torch.inference_mode()
    def divergences(self, observed: Mapping[str, float]) -> list[float]:
        """Mean KL divergence of each recipe from the source, nats a token.

        observed  canonical linear -> largest input
        """
        table_VD = self.checkpoint.tensor("embedding.weight")
        x_RTD = table_VD[self._ids_WT].flatten(0, 1)[None].repeat(len(self._recipes), 1, 1)
        for layer in range(self.text.num_layers):
            x_RTD = self._layer(layer, x_RTD, observed)
            print(f"layer {layer + 1} of {self.text.num_layers}", flush=True)
        norm_D = self.checkpoint.tensor("norm.weight")
        hidden_RTD = reference.rms_norm(x_RTD, norm_D, self.text.norm_eps)
        head_VD = table_VD if self.text.tied_head else self.checkpoint.tensor("head.weight")
        base_TV = torch.log_softmax(F.linear(hidden_RTD[0], head_VD).float(), -1)
        found = []
        encoded: dict[str, Tensor] = {}
        for recipe, hidden_TD in zip(self._recipes[1:], hidden_RTD[1:], strict=True):
            chosen = (recipe or {}).get("head", "bf16")
            if chosen not in encoded:
                source = SourceWeight("head", head_VD, None)
                encoded[chosen] = (
                    head_VD if chosen == "bf16" else encoded_weight(source, chosen, source.amax())
                )
            if chosen != "bf16":
                hidden_TD = rounder("head", chosen, observed["head"], "declared")(hidden_TD)
            other_TV = torch.log_softmax(F.linear(hidden_TD, encoded[chosen]).float(), -1)
            found.append(float(full_divergence(base_TV, other_TV).kl.mean()))
        return found

    def _layer(self, layer: int, x_RTD: Tensor, observed: Mapping[str, float]) -> Tensor:
        eps, prefix = self.text.norm_eps, f"decoder.{layer}"
        norm_D = self.checkpoint.tensor(f"{prefix}.attention_norm.weight")
        q, k, v = self._products(layer, "attention.input", _normed(x_RTD, norm_D, eps), observed)
        out = torch.stack([self._attend(*one) for one in zip(q, k, v, strict=True)])
        x_RTD = x_RTD + self._products(layer, "attention.o.input", out, observed)[0]
        norm_D = self.checkpoint.tensor(f"{prefix}.mlp_norm.weight")
        gate, up = self._products(layer, "mlp.input", _normed(x_RTD, norm_D, eps), observed)
        hidden = reference.silu_mul(torch.cat([gate, up], -1))
        return x_RTD + self._products(layer, "mlp.down.input", hidden, observed)[0]

    def _attend(self, q_TD: Tensor, k_TD: Tensor, v_TD: Tensor) -> Tensor:
        head = self.text.head_dim
        windows, tokens = self._ids_WT.shape
        q, k, v = (x.view(windows * tokens, -1, head) for x in (q_TD, k_TD, v_TD))
        q, k = reference.rotate(q, k, self._rotation)
        q, k, v = (x.view(windows, tokens, -1, head).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).reshape(windows * tokens, -1)

    def _products(
        self, layer: int, tap: str, x_RTI: Tensor, observed: Mapping[str, float]
    ) -> list[Tensor]:
        """What each linear of a group gives, (R, T, O) each."""
        names = [f"decoder.{layer}.{short}" for short in READERS[tap]]
        weights = [read_weight(self.checkpoint, name, torch.device("cpu")) for name in names]
        maxima = {weight.name: weight.amax() for weight in weights}
        given: list[list[Tensor]] = [[torch.empty(0)] * len(self._recipes) for _ in names]
        kinds: tuple[WeightFormat | None, ...] = (None, "bf16", "fp8", "nvfp4")
        for chosen in kinds:
            which = [
                i for i, recipe in enumerate(self._recipes)
                if (None if recipe is None else recipe[names[0]]) == chosen
            ]  # fmt: skip
            if not which:
                continue
            x = x_RTI[which]
            if chosen is not None and chosen != "bf16":
                x = rounder(names[0], chosen, observed[names[0]], "declared")(x.flatten(0, 1))
                x = x.view(len(which), *x_RTI.shape[1:])
            for one, weight in enumerate(weights):
                w_OI = weight.decoded()
                if chosen is not None and chosen != "bf16":
                    shared = shared_maxima(maxima, dict.fromkeys(names, chosen))
                    w_OI = encoded_weight(weight, chosen, shared[weight.name])
                for i, y_TO in zip(which, F.linear(x, w_OI), strict=True):
                    given[one][i] = y_TO
        return [torch.stack(outputs) for outputs in given]


def _normed(x_RTD: Tensor, norm_D: Tensor, eps: float) -> Tensor:
    return reference.rms_norm(x_RTD, norm_D, eps)


@torch.inference_mode()
def perturbed(
    checkpoint: Checkpoint, ids_WT: Tensor, groups: Sequence[Group], observed: Mapping[str, float]
) -> dict[str, dict[str, dict[str, float]]]:
    """Costs without gradients: errors of the residual stream, alone and grown to the end.

    Every group's error is measured behind its layer, relative to the stream. `grown` multiplies it
    by how much a small random error of each later layer's input grows on its way through.
    """
    text = checkpoint.config.text
    x_TD = checkpoint.tensor("embedding.weight")[ids_WT].flatten(0, 1)
    generator = torch.Generator().manual_seed(0)
    alone: dict[str, dict[str, float]] = {}
    growth: list[float] = []
    for layer in range(text.num_layers):
        prefix = f"decoder.{layer}."
        own = [g.members[0] for g in groups if g.members[0].startswith(prefix)]
        plain: dict[str, WeightFormat] = dict.fromkeys(own, "bf16")
        tried = [(name, chosen) for name in own for chosen in ("fp8", "nvfp4")]
        recipes = [{**plain, name: chosen} for name, chosen in tried]
        side = Side(checkpoint, ids_WT, [*recipes, plain])  # type: ignore[list-item]
        noise_TD = torch.randn(x_TD.shape, generator=generator)
        noise_TD *= 0.02 * x_TD.float().norm(dim=-1, keepdim=True) / text.width**0.5
        x_RTD = torch.cat([x_TD[None].repeat(len(recipes) + 1, 1, 1), (x_TD + noise_TD)[None]])
        started = _relative(x_RTD[-1], x_TD)
        x_RTD = side._layer(layer, x_RTD.to(torch.bfloat16), observed)
        x_TD = x_RTD[0]
        for (name, chosen), y_TD in zip(tried, x_RTD[1:], strict=False):
            alone.setdefault(name, {})[chosen] = _relative(y_TD, x_TD)
        growth.append(_relative(x_RTD[-1], x_TD) / started)
        print(f"perturbed {layer + 1} of {text.num_layers}", flush=True)
    grown = {}
    for name, costs in alone.items():
        later = growth[int(name.split(".")[1]) + 1 :]
        factor = float(torch.tensor(later, dtype=torch.float64).prod()) if later else 1.0
        grown[name] = {chosen: cost * factor for chosen, cost in costs.items()}
    return {"alone": alone, "grown": grown}


def _relative(y_TD: Tensor, x_TD: Tensor) -> float:
    """Squared error against squared size, token by token, on average."""
    error_T = (y_TD.float() - x_TD.float()).square().sum(-1)
    return float((error_T / x_TD.float().square().sum(-1)).mean())


def sums(costs: Mapping[str, Mapping[str, float]], recipes: Sequence[Formats]) -> list[float]:
    """The estimate of every recipe: the costs of its groups, added up."""
    return [
        sum(costs[name][chosen] for name, chosen in recipe.items() if name in costs)
        for recipe in recipes
    ]


def correlations(estimate: Sequence[float], kl: Sequence[float]) -> dict[str, float]:
    """Spearman's over all recipes and over those of one size, which come last."""
    half = len(kl) // 2
    return {
        "all": round(float(stats.spearmanr(estimate, kl).statistic), 4),
        "one size": round(float(stats.spearmanr(estimate[half:], kl[half:]).statistic), 4),
    }


def largest_inputs(checkpoint: Checkpoint, args: argparse.Namespace) -> dict[str, float]:
    """The largest input of every linear over the text of the package, head included."""
    from halfbyte.calibrate.activations import Activations
    from halfbyte.calibrate.stream import head_statistics, stream_layers

    rows = builtin_rows(checkpoint.directory, samples=64, tokens_per_sample=512)
    rows = some_rows(rows, args.tokens)
    text = checkpoint.config.text
    activations = Activations([row.numel() for row in rows], text.width)
    found = {}
    for statistics in stream_layers(checkpoint, rows, activations=activations):
        for readers in READERS.values():
            for short in readers:
                name = f"decoder.{statistics.layer}.{short}"
                found[name] = float(statistics.input_of(name))
    found["head"] = float(head_statistics(checkpoint, activations).input_of("head"))
    activations.close()
    return found


def main() -> None:
    args = parse()
    log.configure(level="warning")
    torch.set_num_threads(1)
    tied, untied = sources(args)
    observed = cached(args, "observed", lambda: largest_inputs(untied, args))
    ids_WT = windows_of(args, tied)
    groups = measured(args, tied)
    card = library(CARD, tied, groups)
    recipes = random_recipes(groups, card)
    kl = cached(args, "random", lambda: Side(tied, ids_WT, recipes).divergences(observed))
    others = cached(args, "perturbed", lambda: perturbed(tied, ids_WT, groups, observed))
    costs = {group.members[0]: group.losses for group in groups}
    ranked = {
        "gradients": correlations(sums(costs, recipes), kl),
        **{name: correlations(sums(found, recipes), kl) for name, found in others.items()},
    }
    print(json.dumps(ranked, indent=1))
    own = unmeasured_groups(untied.config, untied.quantization)[-1]
    head = cached(args, "head", lambda: head_costs(untied, args))
    wider = [*groups, replace(own, losses=head)]
    everywhere = library(EVERYWHERE, tied, groups)
    by_card, card_facts = budgeted(groups, num_bytes(groups, card))
    _, bound = budgeted(groups, num_bytes(groups, everywhere))
    twins: dict[str, Formats] = {}
    twin_facts = {}
    for name, formats in ((CARD, card), (EVERYWHERE, everywhere)):
        there: Formats = {**formats, "head": "bf16"}
        by_twin, twin_facts[f"{name}, head apart"] = budgeted(wider, num_bytes(wider, there))
        twins |= {name: there, f"budget of {name}": by_twin}
    named: dict[str, Formats] = {
        "fp8": dict.fromkeys(card, "fp8"), CARD: card, f"budget of {CARD}": by_card,
        EVERYWHERE: everywhere,
    }  # fmt: skip
    few = cached(
        args, "tied", lambda: Side(tied, ids_WT, list(named.values())).divergences(observed)
    )
    apart = cached(
        args, "twin", lambda: Side(untied, ids_WT, list(twins.values())).divergences(observed)
    )
    results = {
        "cost_tokens": args.tokens,
        "scored_tokens": ids_WT.numel(),
        "rank_correlation": ranked,
        "random": [
            {"bytes": num_bytes(groups, recipe), "estimate": estimate, "kl": found}
            for recipe, estimate, found in zip(recipes, sums(costs, recipes), kl, strict=True)
        ],
        "tied": dict(zip(named, few, strict=True)),
        "twin": dict(zip(twins, apart, strict=True)),
        "choices": {CARD: card_facts, EVERYWHERE: bound, **twin_facts},
    }
    record.write(
        args.out,
        name="budget",
        question="Does the measured cost of formats choose better recipes for the same bytes?",
        command="PYTHONPATH=src python benchmarks/budget.py " + " ".join(sys.argv[1:]),
        figures=figures_of(results),
        results=results,
    )


def head_costs(untied: Checkpoint, args: argparse.Namespace) -> dict[str, float]:
    """What each format of the twin's head costs; its other groups are those of the tied model."""
    return dict(measured(args, untied)[-1].losses)


def figures_of(results: Mapping[str, Any]) -> list[Figure]:
    """KL of what is chosen against that of the library's recipe in the same bytes."""
    tied, twin = results["tied"], results["twin"]
    apart = "SmolLM2-135M, head apart"
    pairs = [
        ("SmolLM2-135M", CARD, tied[f"budget of {CARD}"], tied[CARD], 0.85),
        (apart, CARD, twin[f"budget of {CARD}"], twin[CARD], 0.85),
        (apart, EVERYWHERE, twin[f"budget of {EVERYWHERE}"], twin[EVERYWHERE], 0.6),
    ]
    return [
        Figure(
            "KL divergence of a recipe by budget",
            found,
            "nats/token",
            "fidelity",
            {"model": model, "bytes of": recipe, "arithmetic": "declared"},
            (Against(recipe, was), Against("at most", share * was, is_bound=True)),
        )
        for model, recipe, found, was, share in pairs
    ]


if __name__ == "__main__":
    main()
