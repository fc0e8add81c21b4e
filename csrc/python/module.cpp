// precond._C: bindings, no arithmetic. Built without torch; sees tensors through addresses only.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "cpu/dispatch.h"
#include "python/spans.h"
#include "python/tensors.h"
#include "rules/registry.h"

namespace py = pybind11;
using namespace precond;

namespace {

int rule_number(const std::string& name) {
  const auto& list = rules();
  for (size_t i = 0; i < list.size(); ++i)
    if (name == list[i].name) return int(i);
  throw py::key_error("no rule named " + name);
}

// What a rule says of itself.
struct Rule {
  int number;
  const RuleInfo* info;
  py::tuple second_moments, hyper;  // made once: a step reads them
};

// By the names of rules: themselves, or each with what its name has after them.
py::dict rule_table(const std::string& parts) {
  py::dict table;
  for (size_t i = 0; i < rules().size(); ++i) {
    const RuleInfo& info = rules()[i];
    const std::string name = info.name, base = name.substr(0, name.find('+'));
    if (base + parts != name) continue;
    py::list squares;
    for (int k = 0; k < info.states; ++k)
      if (info.squares >> k & 1) squares.append(k);
    table[base.c_str()] = Rule{int(i), &info, py::tuple(squares), py::tuple(py::cast(info.hyper))};
  }
  return table;
}

const RuleInfo& checked(const std::string& rule, size_t hyper) {
  const RuleInfo& info = rules()[size_t(rule_number(rule))];
  if (hyper != info.hyper.size())
    throw py::value_error(rule + " takes " + std::to_string(info.hyper.size()) + " hyper-parameters, got " +
                          std::to_string(hyper));
  return info;
}

// The scalars of a rule for one step: what a plan's kernels read.
std::vector<float> scalars(const std::string& rule, const std::vector<double>& hyper, double step, bool fresh,
                           float scalar) {
  const RuleInfo& info = checked(rule, hyper.size());
  std::vector<float> filled(kScalarFloats);
  info.fill(hyper.data(), step, fresh, scalar, filled.data());
  filled.resize(size_t(info.scalars));
  return filled;
}

float advance(const std::string& rule, const std::vector<double>& hyper, double step, float scalar) {
  return float(checked(rule, hyper.size()).advanced(hyper.data(), step, scalar));
}

Request request(int rule, float sign, const std::vector<double>& hyper) {
  if (hyper.size() != rules().at(size_t(rule)).hyper.size())
    throw py::value_error("a row must have a value for each hyper-parameter of its rule");
  Request r;
  r.row.rule = rule;
  r.row.sign = sign;
  std::copy(hyper.begin(), hyper.end(), r.row.hyper);
  return r;
}

void read_from(Request& request, int index, uintptr_t address, bool is_double) {
  request.row.hyper[index] = std::numeric_limits<double>::quiet_NaN();
  request.overrides.push_back({reinterpret_cast<const void*>(address), 0, index, is_double});
}

std::vector<double> hyper_of(const Request& request) {
  const double* values = request.row.hyper;
  return {values, values + rules()[size_t(request.row.rule)].hyper.size()};
}

std::map<int, uintptr_t> addresses_of(const Request& request) {
  std::map<int, uintptr_t> addresses;
  for (const Override& o : request.overrides) addresses[o.index] = reinterpret_cast<uintptr_t>(o.value);
  return addresses;
}

// What a step does besides, and what it does with the norm, from the addresses of torch's tensors.
Extras extras(uintptr_t sums, uintptr_t factors, bool only) {
  return {reinterpret_cast<double*>(sums), reinterpret_cast<const float*>(factors), only};
}

Clip clip(uintptr_t total, uintptr_t grad_norm, uintptr_t clip_coef, uintptr_t skipped, float max_norm, int classes,
          bool inf, bool skip_nonfinite, bool measure) {
  Clip c;
  c.total = reinterpret_cast<double*>(total);
  c.grad_norm = reinterpret_cast<float*>(grad_norm);
  c.clip_coef = reinterpret_cast<float*>(clip_coef);
  c.skipped = reinterpret_cast<int64_t*>(skipped);
  c.max_norm = max_norm;
  c.classes = classes;
  c.inf = inf;
  c.skip_nonfinite = skip_nonfinite;
  c.measure = measure;
  return c;
}

// The transform of BNP, from the addresses of torch's tensors.
void bnp(uintptr_t weight_grad, uintptr_t bias_grad, uintptr_t mean, uintptr_t scale, uintptr_t weight_out,
         uintptr_t bias_out, int64_t rows, int64_t length, int64_t rows_per_group, float inv_q2, int threads) {
  precondition(
      {reinterpret_cast<const float*>(weight_grad), reinterpret_cast<const float*>(bias_grad),
       reinterpret_cast<const float*>(mean), reinterpret_cast<const float*>(scale),
       reinterpret_cast<float*>(weight_out), reinterpret_cast<float*>(bias_out), rows, length, rows_per_group, inv_q2},
      threads);
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

#if defined(PRECOND_CUDA)
  m.attr("cuda") = PRECOND_CUDA;
  m.def("why_no_cuda", &why_no_cuda);
  m.def("why_not_on", &why_not_on, py::arg("device"));
#else
  m.attr("cuda") = "";
  const auto why_no_cuda = [] { return std::string("the extension was built without CUDA: " PRECOND_WHY_NO_CUDA); };
  m.def("why_no_cuda", why_no_cuda);
  m.def("why_not_on", [=](int) { return why_no_cuda(); }, py::arg("device"));
#endif
#if defined(PRECOND_CUDA_ON_HOST)
  m.attr("cuda_on_host") = true;
#else
  m.attr("cuda_on_host") = false;
#endif

  py::class_<Rule>(m, "Rule")
      .def_readonly("number", &Rule::number)
      .def_property_readonly("states", [](const Rule& r) { return r.info->states; })
      .def_readonly("second_moments", &Rule::second_moments)
      .def_readonly("hyper", &Rule::hyper)
      .def_property_readonly("reads_step", [](const Rule& r) { return r.info->reads_step; })
      .def_property_readonly("scalar_states", [](const Rule& r) { return r.info->scalar_states; })
      .def_property_readonly("type", [](const Rule& r) { return r.info->type; });
  m.attr("rules") = rule_table("");
  py::dict with_parts;
  for (const char* const parts : {"parts", "ema"}) with_parts[parts] = rule_table(std::string("+") + parts);
  m.attr("rules_with_parts") = with_parts;

  py::dict formats;
  for (int i = 0; i < kFormatCount; ++i) formats[kFormats[i].name] = i;
  m.attr("formats") = formats;
  m.attr("group") = kGroup;

  m.def("scalars", &scalars, py::arg("rule"), py::arg("hyper"), py::arg("step"), py::arg("fresh"),
        py::arg("scalar") = 0.0f);
  m.def("advance", &advance, py::arg("rule"), py::arg("hyper"), py::arg("step"), py::arg("scalar"));
  m.def("available_isas", &available_isas);
  m.def("select_isa", &select_isa, py::arg("name"));
  m.def("selected_isa", &selected_isa);
  m.def("openmp_threads", &openmp_threads);
  m.def("bnp", &bnp, py::arg("weight_grad"), py::arg("bias_grad"), py::arg("mean"), py::arg("scale"),
        py::arg("weight_out"), py::arg("bias_out"), py::arg("rows"), py::arg("length"), py::arg("rows_per_group"),
        py::arg("inv_q2"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  py::class_<Reader>(m, "Reader")
      .def(py::init<py::tuple, py::object, py::object, bool>(), py::arg("tensor_types"), py::arg("slots_of"),
           py::arg("local"), py::arg("use_exchange"))
      .def("alike", &Reader::alike, py::arg("tensors"))
      .def("ready", &Reader::ready, py::arg("groups"), py::arg("inputs"), py::arg("state"), py::arg("written"),
           py::arg("owners"))
      .def_property_readonly("uses_exchange", &Reader::uses_exchange);

  py::class_<Spans>(m, "Spans")
      .def(py::init<const Reader&>(), py::arg("reader"), py::keep_alive<1, 2>())
      .def("add", &Spans::add, py::arg("tensors"));

  py::class_<Clip>(m, "Clip").def(py::init(&clip), py::kw_only(), py::arg("total") = 0, py::arg("grad_norm") = 0,
                                  py::arg("clip_coef") = 0, py::arg("skipped") = 0, py::arg("max_norm") = 0.0f,
                                  py::arg("classes") = 1, py::arg("inf") = false, py::arg("skip_nonfinite") = false,
                                  py::arg("measure") = false);

  py::class_<Extras>(m, "Extras")
      .def(py::init(&extras), py::kw_only(), py::arg("sums") = 0, py::arg("factors") = 0, py::arg("only") = false);

  py::class_<Request>(m, "Row")
      .def(py::init(&request), py::kw_only(), py::arg("rule"), py::arg("sign"), py::arg("hyper"))
      .def_property_readonly("hyper", &hyper_of)
      .def_property_readonly("addresses", &addresses_of)
      .def("read_from", &read_from, py::arg("index"), py::arg("address"), py::arg("is_double"));

  declare_offload(m);
  py::class_<TensorPlan>(m, "Plan")
      .def(py::init<const Reader&, const std::map<int, std::vector<std::string>>&, const std::string&, int64_t, int,
                    std::optional<int>>(),
           py::arg("reader"), py::arg("state_names"), py::arg("step_name"), py::arg("chunk"), py::arg("device"),
           py::arg("gradients") = std::nullopt, py::keep_alive<1, 2>())
      .def("add", &TensorPlan::add, py::arg("param"), py::arg("state"), py::kw_only(), py::arg("group"),
           py::arg("rule"), py::arg("fresh"), py::arg("counts"), py::arg("step_on_device"), py::arg("formats"),
           py::arg("draws"), py::arg("place"), py::arg("at") = -1)
      .def("add_ready", &TensorPlan::add_ready, py::arg("params"), py::arg("state"), py::kw_only(), py::arg("group"),
           py::arg("rule"), py::arg("counts"), py::arg("step_on_device"))
      .def("defer", &TensorPlan::defer, py::arg("param"), py::arg("group"))
      .def("ignore", &TensorPlan::ignore, py::arg("param"), py::arg("group"))
      .def("seal", &TensorPlan::seal, py::arg("state"))
      .def("refresh", &TensorPlan::refresh, py::arg("param_groups"), py::arg("state"), py::arg("inputs"),
           py::arg("rows"))
      .def_property_readonly("newcomers", &TensorPlan::newcomers)
      .def_property_readonly("has_gradients", &TensorPlan::has_gradients)
      .def("release", &TensorPlan::release)
      .def("set_norm_classes", &TensorPlan::set_norm_classes, py::arg("classes"))
      .def("norm", &TensorPlan::norm, py::arg("clip"), py::arg("threads"))
      .def("norm_cuda", &TensorPlan::norm_cuda, py::arg("clip"), py::arg("stream"))
      .def("run", &TensorPlan::run, py::arg("grad_coef"), py::arg("clip_value"), py::arg("clip"), py::arg("threads"),
           py::arg("extras"))
      .def("run_cuda", &TensorPlan::run_cuda, py::arg("grad_coef"), py::arg("clip_value"), py::arg("clip"),
           py::arg("grad_scale"), py::arg("found_inf"), py::arg("stream"), py::arg("extras"))
#if defined(PRECOND_CUDA)
      .def("submit", &TensorPlan::submit, py::arg("link"), py::arg("params"), py::kw_only(), py::arg("grad_coef"),
           py::arg("clip_value"), py::arg("clip"), py::arg("grad_scale"), py::arg("found_inf"), py::arg("stream"),
           py::arg("threads"), py::arg("extras"), py::arg("held"))
#endif
      .def_property_readonly("skipped", &TensorPlan::skipped)
      .def_property_readonly("launches", &TensorPlan::launches)
      .def_property_readonly("was_captured", &TensorPlan::was_captured);
}
