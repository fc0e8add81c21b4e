// precond._C: bindings, no arithmetic. Built without torch; sees tensors through addresses only.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "dispatch.h"
#include "tensors.h"

namespace py = pybind11;
using namespace precond;

namespace {

int rule_number(const std::string& name) {
  const auto& list = rules();
  for (size_t i = 0; i < list.size(); ++i)
    if (name == list[i].name) return int(i);
  throw py::key_error("no rule named " + name);
}

// The scalars of a rule for one step: what fill_row writes into the plan.
std::vector<float> scalars(const std::string& rule, const std::vector<double>& hyper, double step, bool fresh) {
  const RuleInfo& info = rules()[rule_number(rule)];
  if (hyper.size() != info.hyper.size())
    throw py::value_error(rule + " takes " + std::to_string(info.hyper.size()) + " hyper-parameters, got " +
                          std::to_string(hyper.size()));
  std::vector<float> row(kRowFloats);
  info.fill_row(hyper.data(), step, fresh, row.data());
  row.resize(info.row_floats);
  return row;
}

int openmp_threads() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled core of precond: plans and the CPU update.";
  m.attr("version") = PRECOND_VERSION;
  m.attr("compiler") = PRECOND_COMPILER;
  m.attr("chunk_align") = kChunkAlign;

  py::dict table;
  for (const RuleInfo& info : rules())
    table[info.name] = py::make_tuple(rule_number(info.name), info.states, info.hyper);
  m.attr("rules") = table;

  m.def("scalars", &scalars, py::arg("rule"), py::arg("hyper"), py::arg("step"), py::arg("fresh"));
  m.def("available_isas", &available_isas);
  m.def("select_isa", &select_isa, py::arg("name"));
  m.def("selected_isa", &selected_isa);
  m.def("openmp_threads", &openmp_threads);

  py::class_<Reader>(m, "Reader")
      .def(py::init<py::tuple, py::object, bool>(), py::arg("tensor_types"), py::arg("local"), py::arg("use_exchange"))
      .def_property_readonly("uses_exchange", &Reader::uses_exchange);

  py::class_<TensorPlan>(m, "Plan")
      .def(py::init<const Reader&, const std::vector<std::string>&, const std::string&, int64_t>(), py::arg("reader"),
           py::arg("state_names"), py::arg("step_name"), py::arg("chunk"), py::keep_alive<1, 2>())
      .def("add", &TensorPlan::add, py::arg("param"), py::arg("state"), py::arg("group"), py::arg("rule"),
           py::arg("fresh"))
      .def("defer", &TensorPlan::defer, py::arg("param"))
      .def("ignore", &TensorPlan::ignore, py::arg("param"))
      .def("seal", &TensorPlan::seal, py::arg("state"))
      .def("step", &TensorPlan::step, py::arg("param_groups"), py::arg("state"), py::arg("inputs"), py::arg("rows"),
           py::arg("grad_coef"), py::arg("skip"), py::arg("threads"))
      .def("chunks", [](TensorPlan& p, int threads) { return p.plan().chunks(threads).size(); }, py::arg("threads"));
}
