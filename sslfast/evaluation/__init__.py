"""Evaluations of frozen or fine-tuned trunks, one file each. Imports ``weights``, ``methods`` and what lies below."""

from sslfast.evaluation.dataset import EvaluationSet, load_evaluation_set
from sslfast.evaluation.encoders import RAW_PIXELS, TRAINED, UNTRAINED, Encoder, TrunkEncoder, load_run, trunk_encoders
from sslfast.evaluation.knn import bank_knn, knn_result, nearest_neighbours
from sslfast.evaluation.linear_probe import PROTOCOL, STRENGTHS, linear_result, train_probe
from sslfast.evaluation.results import evaluation_folder, mean_and_spread, run_facts, write_result
from sslfast.evaluation.sgd import Progress, check_training
from sslfast.evaluation.table import detection_table
from sslfast.evaluation.voc import annotation_path, read_annotation, split_ids, voc_root

__all__ = [
    "PROTOCOL",
    "RAW_PIXELS",
    "STRENGTHS",
    "TRAINED",
    "UNTRAINED",
    "Encoder",
    "EvaluationSet",
    "Progress",
    "TrunkEncoder",
    "annotation_path",
    "bank_knn",
    "check_training",
    "detection",
    "detection_table",
    "evaluation_folder",
    "knn",
    "knn_result",
    "linear_probe",
    "linear_result",
    "load_evaluation_set",
    "load_run",
    "mean_and_spread",
    "nearest_neighbours",
    "read_annotation",
    "run_facts",
    "semisup",
    "split_ids",
    "svm",
    "train_probe",
    "trunk_encoders",
    "voc_root",
    "write_result",
]
