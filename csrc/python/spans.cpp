// See spans.h.
#include "python/spans.h"

#include <algorithm>
#include <set>

#include "plan/layout.h"

namespace precond {
namespace {

struct Span {
  uintptr_t begin, end;
  int64_t place;
};

}  // namespace

std::vector<int64_t> Spans::add(const py::list& tensors) {
  std::set<int64_t> meeting;
  std::vector<Span> spans;
  View view;
  int64_t place = -1;
  for (const py::handle tensor : tensors) {
    ++place;
    try {
      reader_.read(tensor.ptr(), &view);
    } catch (const py::error_already_set&) {
      continue;  // it has no memory to share
    }
    int64_t last = 0;
    bool empty = view.data == nullptr;
    for (int d = 0; d < view.ndim; ++d) {
      empty = empty || view.shape[d] == 0;
      last += (view.shape[d] - 1) * view.strides[d];
    }
    if (empty) continue;
    const auto begin = reinterpret_cast<uintptr_t>(view.data);
    spans.push_back({begin, begin + uintptr_t(last + 1) * uintptr_t(view.itemsize), place});
    if (view.ndim > 64 || !is_dense(storage_order(view.shape, view.strides, view.ndim), view.shape, view.strides))
      meeting.insert(place);
  }
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  const Span* longest = nullptr;  // the one that reaches farthest of those before
  std::vector<std::pair<uintptr_t, uintptr_t>> all;
  for (const Span& span : spans) {
    if (longest != nullptr && span.begin < longest->end) meeting.insert({span.place, longest->place});
    if (longest == nullptr || span.end > longest->end) longest = &span;
    const auto next = std::upper_bound(known_.begin(), known_.end(), std::make_pair(span.begin, UINTPTR_MAX));
    if ((next != known_.end() && next->first < span.end) ||
        (next != known_.begin() && std::prev(next)->second > span.begin))
      meeting.insert(span.place);
    all.emplace_back(span.begin, span.end);
  }
  std::vector<std::pair<uintptr_t, uintptr_t>> sorted(known_.size() + all.size());
  std::merge(known_.begin(), known_.end(), all.begin(), all.end(), sorted.begin());
  known_.clear();
  for (const auto& [begin, end] : sorted) {
    if (!known_.empty() && begin < known_.back().second)
      known_.back().second = std::max(known_.back().second, end);
    else
      known_.emplace_back(begin, end);
  }
  return {meeting.begin(), meeting.end()};
}

}  // namespace precond
