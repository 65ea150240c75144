"""Evaluations of frozen or fine-tuned trunks: one module, one configuration and one function each.

``evaluate_<name>(run, data, config)`` returns the result as JSON values and writes it to ``RUN/evaluation``. Detection
is in the package ``detection``, which needs torchvision's detection models. Imports ``weights``, ``methods`` and what
lies below.
"""

from sslfast.evaluation.cache import FeatureCache, scratch_folder
from sslfast.evaluation.dataset import EvaluationSet, FeatureConfig, load_evaluation_set
from sslfast.evaluation.embed import SUFFIXES as EMBEDDING_SUFFIXES
from sslfast.evaluation.embed import Embeddings, embed_all, read_embeddings, write_embeddings
from sslfast.evaluation.encoders import (
    RAW_PIXELS,
    TRAINED,
    UNTRAINED,
    Encoder,
    RunEncoders,
    TrunkEncoder,
    encoder_of,
    extract_all,
    load_run,
)
from sslfast.evaluation.folders import UnsuitableError, load_manifests
from sslfast.evaluation.knn import (
    KnnConfig,
    NearestImages,
    bank_knn,
    bank_neighbours,
    evaluate_knn,
    knn_accuracy,
    knn_result,
    nearest_neighbours,
    shared_knn_accuracy,
)
from sslfast.evaluation.lettering import Lettering, load_font
from sslfast.evaluation.linear import LinearConfig, evaluate_linear
from sslfast.evaluation.linear_probe import L2_STRENGTHS, PROBE_PROTOCOL, linear_result, probe_scores, train_probe
from sslfast.evaluation.preprocessing import resolve_preprocessing
from sslfast.evaluation.results import ResultNotWritten, evaluation_folder
from sslfast.evaluation.semisup import SemisupConfig, evaluate_semisup
from sslfast.evaluation.svm import SvmConfig, evaluate_svm
from sslfast.evaluation.transform import EvaluationTransform, load_transform

__all__ = [
    "EMBEDDING_SUFFIXES",
    "L2_STRENGTHS",
    "PROBE_PROTOCOL",
    "RAW_PIXELS",
    "TRAINED",
    "UNTRAINED",
    "Embeddings",
    "Encoder",
    "EvaluationSet",
    "EvaluationTransform",
    "FeatureCache",
    "FeatureConfig",
    "KnnConfig",
    "Lettering",
    "LinearConfig",
    "NearestImages",
    "ResultNotWritten",
    "RunEncoders",
    "SemisupConfig",
    "SvmConfig",
    "TrunkEncoder",
    "UnsuitableError",
    "bank_knn",
    "bank_neighbours",
    "embed_all",
    "encoder_of",
    "evaluate_knn",
    "evaluate_linear",
    "evaluate_semisup",
    "evaluate_svm",
    "evaluation_folder",
    "extract_all",
    "knn_accuracy",
    "knn_result",
    "linear_result",
    "load_evaluation_set",
    "load_font",
    "load_manifests",
    "load_run",
    "load_transform",
    "nearest_neighbours",
    "probe_scores",
    "read_embeddings",
    "resolve_preprocessing",
    "scratch_folder",
    "shared_knn_accuracy",
    "train_probe",
    "write_embeddings",
]
