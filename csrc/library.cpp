// The schemas of all ops. Kernels register themselves in cpu/<op>.cpp and cuda/<op>.cu;
// fakes and autograd formulas live in sslfast/ops/<op>.py. Shapes: V views, B batch, N bank rows, D columns, K
// negatives.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(sslfast, m) {
  // Rows [B, K] that sampled negatives use; step_tensor (0-d int64), where given, replaces step. shared: the draw that
  // a whole batch shares, one row for every entry of index, which must be zeros.
  m.def(
      "negative_rows(Tensor index, Tensor? step_tensor, int step, int num_negatives, int num_rows, int seed, "
      "bool exclude_self, bool shared) -> Tensor");
  // Loss [V, B], log-sum-exp of all K+1 scores [V, B] and d loss / d query [V, B, D] in one pass over the rows.
  // negatives: none (drawn) or [B, K]. binary: NCE with normaliser z (z_tensor, where given, replaces z), else InfoNCE.
  // num_rows, where not -1: the bank is rows first_row .. of one of num_rows, whose other rows are skipped.
  m.def(
      "bank_nce(Tensor query, Tensor bank, Tensor index, Tensor? negatives, Tensor? step_tensor, int step, Tensor? "
      "z_tensor, "
      "float z, int num_negatives, float temperature, bool binary, bool exclude_self, int seed, "
      "int first_row=0, int num_rows=-1) "
      "-> (Tensor, Tensor, Tensor)");
  // The same against one list for all queries: negatives [K], or none for the whole bank. index -1: no positive.
  m.def(
      "bank_nce_dense(Tensor query, Tensor bank, Tensor index, Tensor? negatives, Tensor? z_tensor, float z, "
      "float temperature, bool binary, bool exclude_self) -> (Tensor, Tensor, Tensor)");
  // bank[index] = normalize(momentum * bank[index] + (1 - momentum) * features); of a repeated index the last wins, -1
  // is skipped.
  m.def("bank_update_(Tensor(a!) bank, Tensor index, Tensor features, float momentum) -> ()");
  // Keys [B, D] into a ring of N rows from row head on; head (0-d int64) moves on by B modulo N.
  m.def("bank_enqueue_(Tensor(a!) bank, Tensor(b!) head, Tensor keys) -> ()");
  // Every target = momentum * target + (1 - momentum) * source; momentum_tensor (0-d), where given, replaces momentum.
  m.def("ema_update_(Tensor(a!)[] targets, Tensor[] sources, Tensor? momentum_tensor, float momentum) -> ()");
  // Images [N, C, S, S] turned counter-clockwise by quarter_turns [N].
  m.def("rotate90(Tensor images, Tensor quarter_turns) -> Tensor");
  // The view stage: crops [B, 3, S, S] uint8, turned, cut into patches (grid 0: whole), augmented by parameters
  // [B, M, 14] and normalised, as [B * M, 3, p, p], or [B * M, p, p, 3] when channels_last.
  // photometric false: no picture has that gate open; blur false: none has a sigma.
  m.def(
      "render_views(Tensor crops, Tensor parameters, Tensor? quarter_turns, Tensor? permutation, Tensor? offsets, "
      "int grid, int patch_size, float mean_r, float mean_g, float mean_b, float std_r, float std_g, float std_b, "
      "ScalarType dtype, bool channels_last, bool photometric, bool blur) -> Tensor");
  // sRGB [N, 3, H, W] in 0..1 as CIE Lab, float32; [N, H, W, 3] both ways when channels_last.
  m.def("rgb_to_lab(Tensor pixels, bool channels_last) -> Tensor");
  // Patches [N, grid^2, C, p, p] of images [N, C, H, W]; slot j shows cell permutation[n, j], moved by its offset.
  m.def("jigsaw_patches(Tensor images, Tensor permutation, Tensor offsets, int grid, int patch_size) -> Tensor");
}
