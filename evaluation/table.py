"""An evaluation's result on the console."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_table(result: dict[str, Any], console: Console | None = None) -> None:
    """Print what `evaluate` returned: figures, their conditions, samples and cost."""
    console = console or Console()
    if result["note"]:
        console.print(Text(result["note"], style="italic"))
    console.print(_recall_table(result) if result["kind"] == "recall" else _text_table(result))
    for line in _remarks(result):
        console.print(Text(line))
    for i, sample in enumerate(result.get("samples", [])):
        console.print(Text(f"\nsample {i + 1}", style="bold"))
        console.print(Text(result["prompt"], style="dim"), Text(sample), sep="")
    if "cost" in result:
        console.print()
        console.print(_cost_table(result["cost"]))


def _text_table(result: dict[str, Any]) -> Table:
    sizes = result["text"]
    table = _table(_title(result))
    table.add_column("protocol")
    table.add_column("context")
    leaky = " (leaky)" if result["model"]["causal"] == "leaky" else ""
    for name in ("token ppl", "word ppl", "bits/byte"):
        table.add_column(name + leaky, justify="right")
    for name, score in result["protocols"].items():
        table.add_row(name, score["context"], *_rates(score))
        for part, figures in score["ar_slices"].items():
            count = f"{figures['tokens']:,} tokens"
            perplexity = _perplexity(figures["token_perplexity"])
            table.add_row(f"  {part.replace('_', ' ')}", count, perplexity, "-", "-")
    table.add_row("unigram", "none", *_rates(result["unigram"]), style="dim")
    table.caption = (
        f"{sizes['documents']:,} documents, {sizes['tokens']:,} tokens, {sizes['bytes']:,} bytes\n"
        f"{sizes['words']:,} words, ends of lines included{_official(sizes)}"
    )
    return table


def _rates(score: dict[str, Any]) -> list[str]:
    """The three figures; "-" for those of the whole text where a prefix was left out."""
    bits = score["bits_per_byte"]
    return [
        *(_perplexity(score[name]) for name in ("token_perplexity", "word_perplexity")),
        "-" if bits is None else f"{bits:.4f}",
    ]


def _perplexity(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.2f}" if value < 1e6 else f"{value:.3g}"


def _official(sizes: dict[str, Any]) -> str:
    official = sizes["official_words"]
    if official is None:
        return ""
    return " (the official count)" if official == sizes["words"] else f" (officially {official:,})"


def _recall_table(result: dict[str, Any]) -> Table:
    table = _table(_title(result))
    leaky = " (leaky)" if result["model"]["causal"] == "leaky" else ""
    table.add_column("slice")
    for name in ("accuracy" + leaky, "95% interval", "exact", "chance", "state", "sequences"):
        table.add_column(name, justify="right")
    for row in [*result["slices"], *result["groups"], result["all"]]:
        low, high = row["sequence_accuracy_interval"]
        table.add_row(
            row["slice"],
            f"{row['sequence_accuracy']:.3f}",
            f"{low:.3f}-{high:.3f}",
            f"{row['exact_accuracy']:.3f}",
            f"{row['chance']:.3f}",
            f"{_short(row['state_bytes'])}B",
            f"{row['sequences']:,}",
        )
    table.caption = (
        "accuracy: mean over sequences of the share of labelled positions that are right\n"
        "exact: sequences without a wrong position; state: bytes held of one sequence\n"
        f"chance: of {result['guess']}; of naming any possible answer "
        f"{result['all']['chance_of_vocabulary']:.3f}"
    )
    return table


def _remarks(result: dict[str, Any]) -> list[str]:
    """What a reader of the figures has to know."""
    remarks = []
    if result["model"]["causal"] == "leaky":
        remarks.append(
            "LEAKY: this model sees the future, its figures are no prediction: "
            + result["model"]["leak_reason"]
        )
    for name, score in result.get("protocols", {}).items():
        if score["prefix"]:
            remarks.append(
                f"{name}: each window begins with {score['prefix']} places that are read in both "
                f"directions where a mixer can, and the first {score['prefix']} tokens of every "
                f"document are not scored; compare with models under eval.prefix={score['prefix']}"
            )
    if result.get("ar_hits"):
        remarks.append(
            "ar hits: tokens that complete a pair already read in the same context, which "
            f"training shows fewer than {result['ar_hits']:,} times"
        )
    if result.get("num_passes", 1) > 1:
        remarks.append(f"what there is to know is shown {result['num_passes']} times (JRT-Prompt)")
    if result.get("text", {}).get("oov_rate"):
        remarks.append(
            f"{result['text']['oov_rate']:.2%} of the tokens stand for words outside the "
            "vocabulary, which makes perplexity look better than it is"
        )
    return remarks


def _cost_table(cost: dict[str, Any]) -> Table:
    """Two columns: what, and how much."""
    table = _table("cost")
    table.show_header = False
    table.add_column()
    table.add_column(justify="right")
    count, speed = cost["parameters"], cost["speed"]
    table.add_row("parameters", f"{count['total']:,}")
    table.add_row("  of these not embedding or head", f"{count['non_embedding']:,}")
    for length, flops in cost["flops_per_token"].items():
        table.add_row(f"forward FLOPs per token at {_length(length)}", f"{_short(flops)}")
    for length, size in cost["state_bytes"].items():
        table.add_row(f"state at {_length(length)}", f"{_short(size)}B")
    conditions = f"batch {speed['batch_size']}, context {speed['context']}, {speed['dtype']}"
    threads = f", {speed['threads']} threads" if speed["device"] == "cpu" else ""
    table.add_row("prefill, tokens/s", f"{speed['prefill_tokens_per_second']:,.0f}")
    table.add_row("decode, tokens/s", f"{speed['decode_tokens_per_second']:,.0f}")
    table.caption = f"speeds: {conditions}, {speed['device']}{threads}"
    return table


def _title(result: dict[str, Any]) -> str:
    title = f"{result['task']}, {result['split']} split"
    own = result["task"] == result["trained_on"]
    return title if own else f"{title}, of a model trained on {result['trained_on']}"


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        caption_style="dim",
        box=box.SIMPLE_HEAD,
    )


def _length(length: str) -> str:
    return f"{int(length) // 1024}k tokens"


def _short(value: float) -> str:
    """With three figures and a decimal prefix."""
    for prefix in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} T"
