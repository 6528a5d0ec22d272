// Python's view of a step of the decoder. Arguments become plain C++ here, with the interpreter lock held;
// the step runs without it. Ranges and sizes are checked by the decoder.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "bind_decoder.h"

using namespace lowbit;

namespace {

// Objects of one bound class, kept alive while the interpreter lock is released.
template <typename T>
struct Held {
  std::vector<nb::object> owners;
  std::vector<T*> items;
  Held(nb::handle sequence, const char* what, bool optional = false) {
    for (nb::handle h : nb::iter(sequence)) {
      T* item = nullptr;
      if (!(optional && h.is_none()) && (h.is_none() || !nb::try_cast(h, item, false) || !item))
        throw nb::type_error((std::string("expected a list of ") + what).c_str());
      owners.push_back(nb::borrow(h));
      items.push_back(item);
    }
  }
};

[[noreturn]] void refuse(const char* call, const std::string& text) {
  throw nb::value_error((std::string(call) + ": " + text).c_str());
}

void need_one_each(const char* call, const char* what, size_t count, size_t runs) {
  if (count != runs)
    refuse(call,
           std::to_string(count) + " " + what + " for " + std::to_string(runs) + " runs; give one each");
}

std::vector<Run> to_runs(const char* call, const Held<KvCache>& caches, const std::vector<size_t>& counts) {
  if (caches.items.size() != counts.size())
    refuse(call, std::to_string(caches.items.size()) + " caches but " + std::to_string(counts.size()) +
                     " counts; give one count per cache");
  std::vector<Run> runs;
  for (size_t i = 0; i < counts.size(); ++i) runs.push_back({caches.items[i], counts[i]});
  return runs;
}

template <typename T>
struct NewArray {
  T* data;
  nb::object object;
  explicit NewArray(std::initializer_list<size_t> shape) {
    size_t count = 1;
    for (size_t n : shape) count *= n;
    data = new T[count ? count : 1];
    nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
    object = nb::cast(nb::ndarray<nb::numpy, T>(data, shape, owner));
  }
};

nb::object logits(BoundDecoder& self, nb::object tokens, nb::object caches, const std::vector<size_t>& counts,
                  bool all) {
  const std::vector<int32_t> ids = to_tokens(tokens);
  const Held<KvCache> held(caches, "KvCache");
  const std::vector<Run> runs = to_runs("Decoder.logits", held, counts);
  NewArray<float> out({all ? ids.size() : runs.size(), self.decoder.spec().vocab_size});
  {
    nb::gil_scoped_release release;
    self.decoder.logits(ids, runs, all, out.data);
  }
  return out.object;
}

constexpr const char* kStep = "Decoder.step";
using Mask = nb::ndarray<const uint32_t, nb::c_contig, nb::device::cpu>;

// A mask's words, checked against what its run needs.
const uint32_t* to_mask(nb::handle h, size_t index, size_t drafts, size_t words) {
  Mask mask;
  const size_t rows = drafts + 1;
  const bool good = nb::try_cast(h, mask, false) && mask.ndim() >= 1 && mask.ndim() <= 2 &&
                    mask.shape(mask.ndim() - 1) == words && (mask.ndim() == 1 ? 1 : mask.shape(0)) == rows;
  if (!good)
    refuse(kStep, "masks[" + std::to_string(index) + "] must be None or a contiguous uint32 array [" +
                      std::to_string(rows) + ", " + std::to_string(words) + "]" +
                      (rows == 1 ? " or [" + std::to_string(words) + "]" : ""));
  return mask.data();
}

struct BoundStepRun {
  StepRun run;
  bool scored;
};

std::vector<BoundStepRun> run_step(BoundDecoder& self, const std::vector<int32_t>& tokens,
                                   const std::vector<Run>& runs) {
  std::vector<StepRun> results;
  {
    nb::gil_scoped_release release;
    results = self.decoder.step(tokens, runs);
  }
  std::vector<BoundStepRun> bound;
  for (size_t i = 0; i < runs.size(); ++i)
    bound.push_back({std::move(results[i]), runs[i].scores >= 0 && !results[i].failed});
  return bound;
}

nb::object step(BoundDecoder& self, nb::object tokens, nb::object caches, const std::vector<size_t>& counts,
                nb::object samplers, nb::object drafts, nb::object masks, nb::object scores) {
  const std::vector<int32_t> ids = to_tokens(tokens);
  const Held<KvCache> held(caches, "KvCache");
  const Held<Sampler> held_samplers(samplers, "Sampler or None", true);
  std::vector<Run> runs = to_runs(kStep, held, counts);
  need_one_each(kStep, "samplers", held_samplers.items.size(), runs.size());
  for (size_t i = 0; i < runs.size(); ++i) runs[i].sampler = held_samplers.items[i];
  if (!drafts.is_none()) {
    const std::vector<size_t> guesses = nb::cast<std::vector<size_t>>(drafts);
    need_one_each(kStep, "drafts", guesses.size(), runs.size());
    for (size_t i = 0; i < runs.size(); ++i) runs[i].drafts = guesses[i];
  }
  std::vector<nb::object> mask_owners;
  if (!masks.is_none()) {
    need_one_each(kStep, "masks", nb::len(masks), runs.size());
    const size_t words = mask_words(self.decoder.spec().vocab_size);
    size_t i = 0;
    for (nb::handle mask : nb::iter(masks)) {
      if (!mask.is_none()) runs[i].masks = to_mask(mask, i, runs[i].drafts, words);
      mask_owners.push_back(nb::borrow(mask));
      ++i;
    }
  }
  if (!scores.is_none()) {
    need_one_each(kStep, "scores", nb::len(scores), runs.size());
    size_t i = 0;
    for (nb::handle count : nb::iter(scores)) runs[i++].scores = count.is_none() ? -1 : nb::cast<int>(count);
  }
  return nb::cast(run_step(self, ids, runs));
}

[[noreturn]] void not_finite(const char* call, size_t run) {
  throw std::runtime_error(
      std::string(call) + ": the logits of run " + std::to_string(run) +
      " are not finite; its cache is unchanged. Check the weights for damage or overflow");
}

nb::object sample(BoundDecoder& self, nb::object tokens, nb::object caches, const std::vector<size_t>& counts,
                  nb::object samplers) {
  const std::vector<int32_t> ids = to_tokens(tokens);
  const Held<KvCache> held(caches, "KvCache");
  const Held<Sampler> held_samplers(samplers, "Sampler");
  std::vector<Run> runs = to_runs("Decoder.sample", held, counts);
  need_one_each("Decoder.sample", "samplers", held_samplers.items.size(), runs.size());
  for (size_t i = 0; i < runs.size(); ++i) runs[i].sampler = held_samplers.items[i];
  const std::vector<BoundStepRun> results = run_step(self, ids, runs);
  NewArray<int32_t> chosen({runs.size()});
  NewArray<float> logprobs({runs.size()});
  for (size_t i = 0; i < results.size(); ++i) {
    if (results[i].run.failed) not_finite("Decoder.sample", i);
    chosen.data[i] = results[i].run.ids[0];
    logprobs.data[i] = results[i].run.logprobs[0];
  }
  return nb::make_tuple(chosen.object, logprobs.object);
}

nb::object to_array(const std::vector<float>& values) {
  NewArray<float> array({values.size()});
  std::copy(values.begin(), values.end(), array.data);
  return array.object;
}

nb::object score(BoundDecoder& self, nb::object tokens, KvCache& cache) {
  const std::vector<int32_t> ids = to_tokens(tokens);
  if (ids.empty()) throw nb::value_error("Decoder.score: no tokens given; give at least one");
  Run run = {&cache, ids.size()};
  run.scores = 0;
  const StepRun result = std::move(run_step(self, ids, {run})[0].run);
  if (result.failed) not_finite("Decoder.score", 0);
  return to_array(result.scores);
}

}  // namespace

void bind_steps(nb::module_& m, nb::class_<BoundDecoder>& decoder) {
  nb::class_<BoundStepRun>(m, "StepRun", "What a step found out about one of its runs.")
      .def_prop_ro(
          "ids", [](const BoundStepRun& s) { return s.run.ids; }, "Chosen tokens, one more per right guess.")
      .def_prop_ro(
          "logprobs", [](const BoundStepRun& s) { return s.run.logprobs; },
          "Raw log-probability of each chosen token.")
      .def_prop_ro(
          "tops", [](const BoundStepRun& s) { return s.run.tops; },
          "For each chosen token the likeliest ones there: [(id, raw log-probability)].")
      .def_prop_ro(
          "scores", [](const BoundStepRun& s) { return s.scored ? to_array(s.run.scores) : nb::none(); },
          "float32 [count - 1] log-probability of each token after the first, or None.")
      .def_prop_ro(
          "score_tops", [](const BoundStepRun& s) { return s.run.score_tops; },
          "For each score the likeliest tokens there.")
      .def_prop_ro(
          "failed", [](const BoundStepRun& s) { return s.run.failed; },
          "No token could be chosen or scored; cache and sampler are as before the step.");

  decoder
      .def("logits", &logits, nb::arg("tokens"), nb::arg("caches"), nb::arg("counts"), nb::arg("all") = false,
           "Appends counts[i] tokens to caches[i]; float32 [runs, vocab] of the last tokens, or [tokens, "
           "vocab].")
      .def("step", &step, nb::arg("tokens"), nb::arg("caches"), nb::arg("counts"), nb::arg("samplers"),
           nb::arg("drafts") = nb::none(), nb::arg("masks") = nb::none(), nb::arg("scores") = nb::none(),
           "Appends counts[i] tokens to caches[i] and samples what follows with samplers[i], unless that is "
           "None: [StepRun]. "
           "drafts[i]: how many of the run's last tokens are guesses; as many as the sampler chooses too "
           "stay. "
           "masks[i]: tokens that may be chosen, uint32 [(drafts + 1,) ceil(vocab / 32)], or None. "
           "scores[i]: likeliest tokens to report beside the score of each token; -1 or None: no scores.")
      .def("sample", &sample, nb::arg("tokens"), nb::arg("caches"), nb::arg("counts"), nb::arg("samplers"),
           "Appends tokens and samples the next of each run: (int32 [runs], raw log-probabilities [runs]).")
      .def("score", &score, nb::arg("tokens"), nb::arg("cache"),
           "Appends tokens; float32 [tokens - 1] log-probability of each token after the first.");
}
