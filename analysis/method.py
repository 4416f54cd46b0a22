"""The footnotes of a report: how its numbers came about, of these runs."""

from collections.abc import Sequence

from analysis.comparison import Compared, Comparison
from analysis.load import Run
from analysis.statistics import FEWEST_DOCUMENTS, RESAMPLES


def method_notes(comparison: Comparison) -> list[str]:
    """One short paragraph each; only what these runs make use of."""
    notes = [
        "A row is a configuration over its seeds. ± is half of a 95% interval by Student's t over "
        "seeds: with three to five seeds a bootstrap covers far less than it says.",
        "A difference is taken seed by seed where two rows share at least two seeds, and by "
        "Welch's t otherwise. It is claimed where the p-value, adjusted by Holm for all "
        "comparisons of the table, is below 0.05.",
    ]
    if any(d.documents for each in comparison.sections for d in each.differences):
        notes.append(
            "On text a difference has to stand over documents too: the nats of the same test "
            f"documents, means over seeds, are resampled in pairs {RESAMPLES:,} times, and summed "
            "before they are divided by the tokens. The larger of both p-values counts."
        )
    notes += [_few_documents(each) for each in comparison.sections if _few_documents(each)]
    if any(len(row.settings) > 1 for each in comparison.sections for row in each.section.rows):
        notes.append(
            "Tuned keys are chosen for each row by the mean validation score over the seeds that "
            "all of its settings share; the test is not looked at."
        )
    notes += [
        "A run without a result is counted beside n and shown, and a row with such a run, or of a "
        "model that sees the future, is not said to beat another.",
        "Flags compare parameters, forward FLOPs per token, state bytes of one training sequence "
        "and tokens read with the reference and tell differences of more than 1%.",
    ]
    runs = [run for each in comparison.sections for run in each.section.runs]
    return [*notes, *_origin(runs)]


def _few_documents(compared: Compared) -> str:
    texts = compared.section.evaluation.get("documents")
    if texts is None or len(texts) >= FEWEST_DOCUMENTS:
        return ""
    return (
        f"{compared.section.name}: its test has {len(texts)} documents, too few to resample "
        f"({FEWEST_DOCUMENTS} are needed); the differences are over seeds alone."
    )


def _origin(runs: Sequence[Run]) -> list[str]:
    """What the runs were made by, where that is not one thing."""
    commits = {str((run.record.get("git") or {}).get("commit"))[:9] for run in runs}
    dirty = sum(bool((run.record.get("git") or {}).get("dirty")) for run in runs)
    lines = []
    if len(commits) > 1:
        lines.append(f"The runs are of {len(commits)} commits: {', '.join(sorted(commits))}.")
    if dirty:
        lines.append(f"{dirty} of {len(runs)} runs were made by a source tree with changes.")
    return lines
