// based_ops._C: importing it registers the torch ops; it exposes what is not an op.
#include <pybind11/pybind11.h>

#include <utility>

#include "based/ops.h"
#include "checks.h"
#include "cuda_ops.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of based_ops; importing this module registers torch.ops.based_ops.";
  m.def("build_info", [] {
    py::dict info;
    info["version"] = BASED_VERSION;
    info["cpu_instruction_set"] = based::cpu::instruction_set();
    py::list cuda_ops;
    for (const char* op : based::binding::kCudaOps) cuda_ops.append(op);
    info["cuda"] = !based::binding::kCudaOps.empty();
    info["cuda_ops"] = cuda_ops;
    info["cuda_architectures"] = py::str("");
#if defined(BASED_HAS_CUDA)
    info["cuda_architectures"] = BASED_CUDA_ARCHITECTURES;
#endif
    return info;
  });
  m.def("set_checks",
        [](bool enabled) { return std::exchange(based::binding::checks_enabled(), enabled); });
}
