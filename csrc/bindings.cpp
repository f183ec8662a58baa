// Python module sinkattn._C, without tensors and torch: slot arithmetic (RingLayout), huge pages and build_info().
#include <pybind11/pybind11.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <stdexcept>
#include <string>

#include "ring.h"

namespace py = pybind11;
using sinkattn::kMaxTokens;
using sinkattn::RingLayout;
using sinkattn::Run;

namespace {

void require(bool ok, const char* name, const char* expected, int64_t got) {
  if (!ok) throw py::value_error(std::string(name) + ": expected " + expected + ", got " + std::to_string(got));
}

int64_t checked_token(int64_t token) {
  require(token >= 0 && token <= kMaxTokens, "token", "0 to 2^61", token);
  return token;
}

RingLayout make_layout(int64_t num_sinks, int64_t window, int64_t headroom) {
  constexpr int64_t kLimit = int64_t{1} << 40;  // more slots than any memory holds, and sums far from overflow
  require(num_sinks >= 0 && num_sinks < kLimit, "num_sinks", "0 or more (below 2^40)", num_sinks);
  require(window >= 1 && window < kLimit, "window", "1 or more (below 2^40)", window);
  require(headroom >= 0 && headroom < kLimit, "headroom", "0 or more (below 2^40)", headroom);
  return RingLayout{num_sinks, window, headroom};
}

py::list as_list(const Run* runs, int count) {
  py::list out;
  for (int i = 0; i < count; ++i) out.append(py::make_tuple(runs[i].token, runs[i].slot, runs[i].count));
  return out;
}

// Asks Linux for huge pages (2 MiB) for as much of some memory as they fit. It may refuse: then pages are small.
void advise_huge_pages(uintptr_t address, uintptr_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = (address + kPage - 1) / kPage * kPage, end = (address + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

py::dict build_info() {
  py::dict info;
#ifdef SINKATTN_WITH_CUDA
  info["cuda"] = true;
  info["cuda_toolkit"] = SINKATTN_CUDA_TOOLKIT;
#else
  info["cuda"] = false;
  info["cuda_toolkit"] = py::none();
#endif
  info["compiler"] = SINKATTN_COMPILER;
  info["torch_built_with"] = SINKATTN_TORCH_VERSION;
  info["torch_abi_target"] = SINKATTN_TORCH_ABI;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Slot arithmetic of the ring, huge pages, and information about this build.";
  py::class_<RingLayout>(m, "RingLayout", "Maps the tokens of an endless stream to a fixed number of slots.")
      .def(py::init(&make_layout), py::arg("num_sinks"), py::arg("window"), py::arg("headroom") = 0)
      .def_readonly("num_sinks", &RingLayout::num_sinks)
      .def_readonly("window", &RingLayout::window)
      .def_readonly("headroom", &RingLayout::headroom)
      .def_property_readonly("ring", &RingLayout::ring, "Slots of the ring: window + headroom.")
      .def_property_readonly("slots", &RingLayout::slots, "Slots of the cache: num_sinks + ring.")
      .def(
          "slot", [](const RingLayout& layout, int64_t token) { return layout.slot(checked_token(token)); },
          py::arg("token"), "Slot that holds a token.")
      .def(
          "age",
          [](const RingLayout& layout, int64_t token, int64_t slot) {
            require(checked_token(token) >= layout.num_sinks, "token", "num_sinks or more", token);
            require(slot >= layout.num_sinks && slot < layout.slots(), "slot", "num_sinks to slots - 1", slot);
            return layout.age(token, slot);
          },
          py::arg("token"), py::arg("slot"), "How many tokens older than `token` the token in a ring slot is.")
      .def(
          "visible",
          [](const RingLayout& layout, int64_t token, int64_t slot) {
            require(slot >= 0 && slot < layout.slots(), "slot", "0 to slots - 1", slot);
            return layout.visible(checked_token(token), slot);
          },
          py::arg("token"), py::arg("slot"), "Whether the query of `token` sees the key in a slot.")
      .def(
          "window_begin",
          [](const RingLayout& layout, int64_t token) { return layout.window_begin(checked_token(token)); },
          py::arg("token"), "First token of the window of the query of `token`.")
      .def(
          "position", [](const RingLayout& layout, int64_t token) { return layout.position(checked_token(token)); },
          py::arg("token"), "Cache-relative rotary position of a query.")
      .def(
          "write_runs",
          [](const RingLayout& layout, int64_t seen, int64_t count) {
            require(seen >= 0 && seen <= kMaxTokens, "seen", "0 to 2^61", seen);
            require(count >= 0 && count <= kMaxTokens, "count", "0 to 2^61", count);
            Run runs[RingLayout::kMaxRuns];
            return as_list(runs, layout.write_runs(seen, count, runs));
          },
          py::arg("seen"), py::arg("count"), "Runs (token, slot, count) written when `count` tokens are appended.")
      .def(
          "held_runs",
          [](const RingLayout& layout, int64_t end) {
            require(end >= 0 && end <= kMaxTokens, "end", "0 to 2^61", end);
            Run runs[RingLayout::kMaxRuns];
            return as_list(runs, layout.held_runs(end, runs));
          },
          py::arg("end"), "Runs (token, slot, count) that the slots hold after `end` tokens.")
      .def(
          "__eq__",
          [](const RingLayout& a, const RingLayout& b) {
            return a.num_sinks == b.num_sinks && a.window == b.window && a.headroom == b.headroom;
          },
          py::is_operator())
      .def("__hash__",
           [](const RingLayout& a) { return py::hash(py::make_tuple(a.num_sinks, a.window, a.headroom)); })
      .def("__repr__",
           [](const RingLayout& layout) {
             return "RingLayout(num_sinks=" + std::to_string(layout.num_sinks) +
                    ", window=" + std::to_string(layout.window) + ", headroom=" + std::to_string(layout.headroom) +
                    ")";
           })
      .def(py::pickle(
          [](const RingLayout& layout) {
            return py::make_tuple(layout.num_sinks, layout.window, layout.headroom);
          },
          [](const py::tuple& state) {
            return make_layout(state[0].cast<int64_t>(), state[1].cast<int64_t>(), state[2].cast<int64_t>());
          }));
  m.def(
      "advise_huge_pages", &advise_huge_pages, py::arg("address"), py::arg("bytes"),
      "Ask for huge pages for as much of some memory, not used yet, as they fit.");
  m.def("build_info", &build_info, "Compiler, torch and CUDA versions of this build, as a dict.");
}
