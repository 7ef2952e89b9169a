r"""Evaluation: what a model keeps when inputs are missing, attacked, bounded.

    protocol = evaluation.standard(radii=(0.1, 0.25), units="relative")
    report = evaluation.evaluate(model, params, test, protocol=protocol,
                                 reference=train, recipe="crmt")
    report.save("runs/crmt/report")
    print(evaluation.table([report.results, other.results]))
    evaluation.report.render([a, b], path="comparison.html")

``results.json`` is described by :data:`SCHEMA`, ``examples.csv`` by its
``results["examples"]["columns"]``. Keys are added in later versions, never
renamed.
"""

from robust_mm.evaluation import metrics
from robust_mm.evaluation import plots
from robust_mm.evaluation import protocol
from robust_mm.evaluation import report
from robust_mm.evaluation import shift_plots
from robust_mm.evaluation import visuals
from robust_mm.evaluation.masking import masking_report
from robust_mm.evaluation.protocol import Protocol
from robust_mm.evaluation.protocol import standard
from robust_mm.evaluation.report import Report
from robust_mm.evaluation.report import render
from robust_mm.evaluation.report import table
from robust_mm.evaluation.runner import evaluate
from robust_mm.evaluation.shift import ShiftReport
from robust_mm.evaluation.shift import shift_report
from robust_mm.evaluation.shift_scores import chance_level
from robust_mm.evaluation.spelling import caption_report
from robust_mm.evaluation.thorough import Surrogate

SCHEMA = {
  "schema_version": "1",
  "task": (
    "'classification', or 'regression': then clean, subsets, missing and "
    "corrupted have rows of {mae, interval, correlation, num_examples}, in "
    "units of the label (smaller is better), of labels in [-3, 3] also "
    "{accuracy_7, accuracy_2_nonzero, f1_2_nonzero, accuracy_2_has_zero, "
    "f1_2_has_zero}; clean has best_constant_mae, that of the median of the "
    "test labels; or 'multi_label': then rows of {map (mean average precision "
    "over num_classes classes that some example has), interval (null), "
    "hit_at_1, num_classes, num_examples}; clean has constant_map, that of "
    "scores that are all the same; of both what is about one class is null or "
    "empty"
  ),
  "name": "what the report calls the run",
  "dataset": "name of the data, or null",
  "recipe": "name of the training recipe, or null",
  "seed": "integer",
  "settings": (
    "the protocol (radii, modality_radii, norm, units as asked, subsets, "
    "valid_range, batch_size, max_examples, survivors_only, mispair of "
    "captions); attacks {name: "
    "exact settings}; certificate {asked, source, sound, norm, reason}; "
    "corruptions (null, or {kinds {kind: {severity: strength}}, together, "
    "correlated, share}); "
    "modalities, num_classes, input_shapes, input_types, num_reference, "
    "matmul_precision, device, num_devices, versions"
  ),
  "clean": "{accuracy, interval [low, high], num_examples}",
  "subsets": (
    "{'left+right': {accuracy, interval, num_examples}}: only these "
    "modalities available; accuracy is null where no example has any"
  ),
  "contributions": (
    "null, or {values {modality: Shapley contribution to clean accuracy}, "
    "empty: the share of the commonest class, from which they count}"
  ),
  "missing": (
    "null, or {protocol, seeds, rows [{rate, achieved (mean over seeds), "
    "accuracy (likewise), by_seed, digests (SHA-256 of the masks, by seed), "
    "num_examples}]}: random cells absent, the same for every model"
  ),
  "corrupted": (
    "null, or {rows [{kind, modalities, severity, strength, accuracy, "
    "interval, num_examples}], scores {kind: mean accuracy}, score: mean "
    "corruption score, every kind alike}"
  ),
  "attacked": (
    "[{attack, norm (2 or 'inf'), radius, modalities [...], accuracy, "
    "interval, num_examples, largest_size}]: right and not broken by the "
    "attack on these modalities inside one ball; of an ensemble also broken_by "
    "{member: examples it was the first to break}"
  ),
  "certified": (
    "[{radius, modalities [...], accuracy, interval, num_examples, source, "
    "sound, norm (2 or 'inf', the attacks')}]: a curve that holds the attack "
    "radii exactly; with sound false the numbers are estimates and must not be "
    "called certified"
  ),
  "smoothed": (
    "null, or {accuracy, interval, num_examples, abstained, kind, settings, "
    "rows [{radius, modalities, accuracy, interval, num_examples, norm (2, or "
    "0: the radius is a number of modified elements)}]} of the smoothed "
    "classifier: certified with probability 1 - alpha for each example"
  ),
  "region": (
    "null, or for two modalities {modalities [m1, m2], radii [grid1, grid2], "
    "accuracy [len(grid1)][len(grid2)], source, sound, norm}: both budgets at "
    "once"
  ),
  "vulnerability": (
    "null, or {modality: mean share of the squared sensitivity at the nearest "
    "class}; depends on the units"
  ),
  "tightness": (
    "null, or {factors, flipped, num_examples, attack, sound, norm}: share of "
    "predictions flipped at multiples of each example's own joint radius"
  ),
  "captions": (
    "null, or of a model that spells captions what evaluation.caption_report "
    "returns, at the radii of an linf protocol"
  ),
  "masking": (
    "null, or what evaluation.masking_report returns, about the first attack "
    "(of an ensemble its first member) at the middle joint radius"
  ),
  "units": "{modality: raw size of one unit of radius}",
  "checks": "[{name, passed, required, message}]: relations between numbers",
  "examples": "{num_examples, num_left_out, columns {name: meaning}}",
  "timing": (
    "{predict_seconds, attack_seconds, certify_seconds, tightness_seconds, "
    "masking_seconds, smoothing_seconds, shift_seconds, total_seconds}, "
    "compilation included; table_seconds; one compiled call on a chunk: "
    "forward_chunk_seconds, certify_chunk_seconds; peak_memory_mib"
  ),
}

__all__ = [
  "SCHEMA",
  "Protocol",
  "Report",
  "ShiftReport",
  "Surrogate",
  "caption_report",
  "chance_level",
  "evaluate",
  "masking_report",
  "metrics",
  "plots",
  "protocol",
  "render",
  "report",
  "shift_plots",
  "shift_report",
  "standard",
  "table",
  "visuals",
]
