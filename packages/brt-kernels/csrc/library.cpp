// Every schema of this package, beside its implementations: a schema that says `int` where C++ takes a Tensor
// is a crash, not an error, so the two are built into one file and tested with opcheck.
//
// N cells, P paths, K choices of a cell, R routed rows, S trailing sizes of a cell, I O D H features.
#include "check.h"

STABLE_TORCH_LIBRARY(brt_kernels, m) {
  m.def("use_isa(str name) -> str");
  m.def("cuda_refusal() -> str");  // implemented by the CUDA library only
  m.def("device_error(int device, bool wait) -> str");  // as above
  m.def("error_word(int device) -> int");  // as above
  m.def(
      "route(Tensor choice_NK, SymInt num_paths, SymInt[]? capacity=None, Tensor? priority_N=None, "
      "SymInt group_size=0, SymInt multiple=1) -> (Tensor cell_R, Tensor slot_R, Tensor row_NK, Tensor offsets_P1)");
  m.def(
      "route_mask(Tensor mask_NP, SymInt[]? capacity=None, Tensor? priority_N=None, SymInt group_size=0, "
      "SymInt multiple=1) -> (Tensor cell_R, Tensor slot_R, Tensor row_NK, Tensor offsets_P1)");
  m.def("dispatch(Tensor x_NS, Tensor cell_R, Tensor row_NK, Tensor? weight_R=None) -> Tensor");
  m.def("combine(Tensor rows_RS, Tensor row_NK, Tensor cell_R, Tensor? weight_R=None) -> Tensor");
  m.def("row_dot(Tensor rows_RS, Tensor cells_NS, Tensor cell_R, Tensor row_NK) -> Tensor");
  m.def("compact(Tensor keep_N) -> (Tensor index_N, Tensor count_1)");
  m.def(
      "grouped_linear(Tensor x_RI, Tensor offsets_P1, Tensor weight_POI, Tensor? bias_PO=None, "
      "str activation=\"none\") -> Tensor");
  m.def("grouped_outer(Tensor y_RO, Tensor x_RI, Tensor offsets_P1) -> Tensor");
  m.def(
      "expert_mlp(Tensor x_ND, Tensor cell_R, Tensor row_NK, Tensor offsets_P1, Tensor? weight_R, Tensor up_PHD, "
      "Tensor? up_bias_PH, Tensor down_PDH, Tensor? down_bias_PD, str activation) -> Tensor");
  m.def(
      "grouped_conv2d(Tensor[] x_P, Tensor[] weight_P, Tensor[] extras, SymInt[] convs, str activation) -> Tensor[]");
  m.def(
      "conv_chain(Tensor x_RCHW, Tensor offsets_P1, Tensor[] params, SymInt[] steps, SymInt[] step_offsets_P1, "
      "float[] scales, Tensor? packed=None) -> Tensor");
  m.def(
      "conv_chain_pack(Tensor x_RCHW, Tensor offsets_P1, Tensor[] params, SymInt[] steps, SymInt[] step_offsets_P1, "
      "float[] scales) -> Tensor");
  // Two parts of conv_chain, of CUDA only: its plan, and the rest
  m.def(
      "conv_chain_plan(Tensor x_RCHW, Tensor offsets_P1, Tensor[] params, SymInt[] steps, SymInt[] step_offsets_P1, "
      "float[] scales) -> str");
  m.def("conv_chain_planned(Tensor x_RCHW, Tensor offsets_P1, Tensor packed, SymInt[] plan) -> Tensor");
}
