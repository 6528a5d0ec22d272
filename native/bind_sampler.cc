// Python's view of samplers.
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <limits>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>

#include "bind_decoder.h"

using namespace lowbit;

// An int32 array as it is; any other integers one by one, so that none is cut silently.
std::vector<int32_t> to_tokens(nb::handle tokens) {
  nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> array;
  if (nb::try_cast(tokens, array, false)) return {array.data(), array.data() + array.shape(0)};
  std::vector<int64_t> wide;
  if (!nb::try_cast(tokens, wide))
    throw nb::type_error("tokens must be a one-dimensional int32 array or a list of integers");
  std::vector<int32_t> narrow;
  narrow.reserve(wide.size());
  for (int64_t token : wide) {
    if (token < 0 || token > std::numeric_limits<int32_t>::max())
      throw nb::value_error(("token " + std::to_string(token) + " is outside 0 to 2^31 - 1").c_str());
    narrow.push_back(static_cast<int32_t>(token));
  }
  return narrow;
}

namespace {

using MaskVector = nb::ndarray<const uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Holds a sampler for one call from Python.
struct SamplerUse {
  Sampler& sampler;
  explicit SamplerUse(Sampler& s) : sampler(s) {
    if (!s.acquire()) throw std::runtime_error("Sampler: a step is using it; wait until that returns");
  }
  ~SamplerUse() { sampler.release(); }
};

int32_t sample_row(Sampler& self, FloatVector logits, std::optional<MaskVector> mask) {
  const SamplerUse use(self);
  const size_t vocab = logits.shape(0);
  if (vocab == 0 || vocab > size_t{1} << 30)
    throw nb::value_error(("Sampler.sample: " + std::to_string(vocab) + " logits; need 1 to 2^30").c_str());
  if (mask && mask->shape(0) != mask_words(vocab))
    throw nb::value_error(("Sampler.sample: mask has " + std::to_string(mask->shape(0)) + " words; " +
                           std::to_string(vocab) + " logits need " + std::to_string(mask_words(vocab)))
                              .c_str());
  std::vector<float> row(logits.data(), logits.data() + vocab);
  std::vector<LogitChunk> chunks(logit_chunks(vocab));
  for (size_t i = 0; i < chunks.size(); ++i) chunks[i] = scan_chunk(row.data(), vocab, i);
  const LogitStats stats = join_chunks(chunks.data(), chunks.size());
  if (!std::isfinite(stats.log_sum))
    throw std::runtime_error(
        "Sampler.sample: the logits hold NaN or +inf, or are all -inf; at least one must be finite");
  self.reserve(vocab);
  const int32_t id = self.choose(row.data(), vocab, stats, mask ? mask->data() : nullptr);
  if (id < 0) throw std::runtime_error("Sampler.sample: no token is allowed; at least one must be");
  self.commit();
  return id;
}

void observe(Sampler& self, nb::object tokens) {
  const std::vector<int32_t> ids = to_tokens(tokens);
  for (int32_t id : ids)
    if (id < 0)
      throw nb::value_error(("Sampler.observe: token " + std::to_string(id) + " is negative").c_str());
  const SamplerUse use(self);
  self.observe(ids.data(), ids.size());
}

}  // namespace

void bind_sampler(nb::module_& m) {
  nb::class_<Sampler>(
      m, "Sampler",
      "Chooses tokens: bias, penalties, temperature, top-k, top-p, min-p, in this order. The tokens it "
      "chooses join its history. Penalties apply to the whole history.")
      .def(
          "__init__",
          [](Sampler* self, double temperature, int64_t top_k, double top_p, double min_p,
             double repetition_penalty, double presence_penalty, double frequency_penalty, uint64_t seed,
             int64_t top_logprobs, const std::map<int32_t, float>& logit_bias,
             const std::vector<int32_t>& forbid, std::optional<uint64_t> forbid_until) {
            if (top_k < 0)
              throw nb::value_error(
                  ("Sampler: top_k=" + std::to_string(top_k) + " must be 0 (off) or more").c_str());
            if (top_logprobs < 0)
              throw nb::value_error(
                  ("Sampler: top_logprobs=" + std::to_string(top_logprobs) + " must be 0 or more").c_str());
            SamplerOptions o;
            o.temperature = temperature;
            o.top_k = static_cast<size_t>(top_k);
            o.top_p = top_p;
            o.min_p = min_p;
            o.repetition_penalty = repetition_penalty;
            o.presence_penalty = presence_penalty;
            o.frequency_penalty = frequency_penalty;
            o.seed = seed;
            o.top_logprobs = static_cast<size_t>(top_logprobs);
            o.logit_bias.assign(logit_bias.begin(), logit_bias.end());
            o.forbid = forbid;
            o.forbid_until = forbid_until.value_or(UINT64_MAX);
            new (self) Sampler(o);
          },
          nb::arg("temperature") = 0.0, nb::arg("top_k") = 0, nb::arg("top_p") = 1.0, nb::arg("min_p") = 0.0,
          nb::arg("repetition_penalty") = 1.0, nb::arg("presence_penalty") = 0.0,
          nb::arg("frequency_penalty") = 0.0, nb::arg("seed") = 0, nb::arg("top_logprobs") = 0,
          nb::arg("logit_bias") = std::map<int32_t, float>(), nb::arg("forbid") = std::vector<int32_t>(),
          nb::arg("forbid_until") = nb::none(),
          "logit_bias: {token: what is added to its logit}. forbid: tokens that are never chosen before "
          "`forbid_until` tokens have been (None: never at all).")
      .def("observe", &observe, nb::arg("tokens"), "Adds tokens to the history that penalties look at.")
      .def("sample", &sample_row, nb::arg("logits"), nb::arg("mask") = nb::none(),
           "The next token for logits float32 [vocab]. mask: tokens that may be chosen, uint32 [ceil(vocab / "
           "32)], "
           "bit t % 32 of word t // 32.")
      .def("top", &Sampler::top, "The likeliest tokens of the last step: [(id, raw log-probability)].")
      .def_prop_ro("logprob", &Sampler::logprob, "Raw log-probability of the last chosen token.");
}
