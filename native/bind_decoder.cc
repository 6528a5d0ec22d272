// Python's view of the decoder, its caches and samplers. Arguments become plain C++ here, with the
// interpreter lock held; steps run without it. Ranges and sizes are checked by the classes themselves.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>

#include "bind_matrix.h"
#include "decoder.h"

namespace nb = nanobind;
using namespace lowbit;

namespace {

using FloatVector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using TokenVector = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

struct BoundDecoder {
  Decoder decoder;
  std::vector<nb::object> matrices;  // owners of the weights
};

constexpr const char* kActivationNames[] = {"silu", "relu2", "gelu_tanh"};

Activation activation_named(const std::string& name) {
  for (size_t i = 0; i < 3; ++i)
    if (name == kActivationNames[i]) return static_cast<Activation>(i);
  throw nb::value_error(
      ("DecoderSpec: activation '" + name + "' is not one of silu, relu2, gelu_tanh").c_str());
}

// An int32 array as it is; any other integers one by one, so that none is cut silently.
std::vector<int32_t> to_tokens(nb::handle tokens) {
  TokenVector array;
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

// Objects of one bound class, kept alive while the interpreter lock is released.
template <typename T>
struct Held {
  std::vector<nb::object> owners;
  std::vector<T*> items;
  Held(nb::handle sequence, const char* what) {
    for (nb::handle h : nb::iter(sequence)) {
      T* item = nullptr;
      if (h.is_none() || !nb::try_cast(h, item, false) || !item)
        throw nb::type_error((std::string("expected a list of ") + what).c_str());
      owners.push_back(nb::borrow(h));
      items.push_back(item);
    }
  }
};

std::vector<Run> to_runs(const char* call, const Held<KvCache>& caches, const std::vector<size_t>& counts) {
  if (caches.items.size() != counts.size())
    throw nb::value_error((std::string(call) + ": " + std::to_string(caches.items.size()) + " caches but " +
                           std::to_string(counts.size()) + " counts; give one count per cache")
                              .c_str());
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

nb::object sample(BoundDecoder& self, nb::object tokens, nb::object caches, const std::vector<size_t>& counts,
                  nb::object samplers) {
  const std::vector<int32_t> ids = to_tokens(tokens);
  const Held<KvCache> held(caches, "KvCache");
  const Held<Sampler> held_samplers(samplers, "Sampler");
  const std::vector<Run> runs = to_runs("Decoder.sample", held, counts);
  NewArray<int32_t> chosen({runs.size()});
  NewArray<float> logprobs({runs.size()});
  {
    nb::gil_scoped_release release;
    self.decoder.sample(ids, runs, held_samplers.items, chosen.data, logprobs.data);
  }
  return nb::make_tuple(chosen.object, logprobs.object);
}

nb::object score(BoundDecoder& self, nb::object tokens, KvCache& cache) {
  const std::vector<int32_t> ids = to_tokens(tokens);
  if (ids.empty()) throw nb::value_error("Decoder.score: no tokens given; give at least one");
  NewArray<float> out({ids.size() - 1});
  {
    nb::gil_scoped_release release;
    self.decoder.score(ids, &cache, out.data);
  }
  return out.object;
}

// Holds a sampler for one call from Python.
struct SamplerUse {
  Sampler& sampler;
  explicit SamplerUse(Sampler& s) : sampler(s) {
    if (!s.acquire()) throw std::runtime_error("Sampler: a step is using it; wait until that returns");
  }
  ~SamplerUse() { sampler.release(); }
};

int32_t sample_row(Sampler& self, FloatVector logits) {
  const SamplerUse use(self);
  const size_t vocab = logits.shape(0);
  if (vocab == 0 || vocab > size_t{1} << 30)
    throw nb::value_error(("Sampler.sample: " + std::to_string(vocab) + " logits; need 1 to 2^30").c_str());
  std::vector<float> row(logits.data(), logits.data() + vocab);
  std::vector<LogitChunk> chunks(logit_chunks(vocab));
  for (size_t i = 0; i < chunks.size(); ++i) chunks[i] = scan_chunk(row.data(), vocab, i);
  const LogitStats stats = join_chunks(chunks.data(), chunks.size());
  if (!std::isfinite(stats.log_sum))
    throw std::runtime_error(
        "Sampler.sample: the logits hold NaN or +inf, or are all -inf; at least one must be finite");
  self.reserve(vocab);
  const int32_t id = self.choose(row.data(), vocab, stats);
  self.commit(id);
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

void bind_spec(nb::module_& m) {
  nb::class_<DecoderSpec>(m, "DecoderSpec", "Shape of a decoder; plain attributes.")
      .def(nb::init<>())
      .def_rw("n_layers", &DecoderSpec::n_layers)
      .def_rw("hidden_size", &DecoderSpec::hidden_size)
      .def_rw("intermediate_size", &DecoderSpec::intermediate_size)
      .def_rw("n_heads", &DecoderSpec::n_heads)
      .def_rw("n_kv_heads", &DecoderSpec::n_kv_heads)
      .def_rw("head_dim", &DecoderSpec::head_dim)
      .def_rw("vocab_size", &DecoderSpec::vocab_size)
      .def_rw("norm_eps", &DecoderSpec::norm_eps)
      .def_prop_rw(
          "activation",
          [](const DecoderSpec& s) {
            return std::string(kActivationNames[static_cast<size_t>(s.activation)]);
          },
          [](DecoderSpec& s, const std::string& name) { s.activation = activation_named(name); })
      .def_rw("qk_norm", &DecoderSpec::qk_norm)
      .def_rw("sub_norm", &DecoderSpec::sub_norm)
      .def_rw("attention_scale", &DecoderSpec::attention_scale)
      .def_rw("activation_bits", &DecoderSpec::activation_bits)
      .def_rw("kv_bits", &DecoderSpec::kv_bits)
      .def_rw("rotary_dim", &DecoderSpec::rotary_dim);
}

void bind_sampler(nb::module_& m) {
  nb::class_<Sampler>(
      m, "Sampler",
      "Chooses tokens: penalties, temperature, top-k, top-p, min-p, in this order. The tokens it "
      "chooses join its history. Penalties apply to the whole history.")
      .def(
          "__init__",
          [](Sampler* self, double temperature, int64_t top_k, double top_p, double min_p,
             double repetition_penalty, double presence_penalty, double frequency_penalty, uint64_t seed,
             int64_t top_logprobs) {
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
            new (self) Sampler(o);
          },
          nb::arg("temperature") = 0.0, nb::arg("top_k") = 0, nb::arg("top_p") = 1.0, nb::arg("min_p") = 0.0,
          nb::arg("repetition_penalty") = 1.0, nb::arg("presence_penalty") = 0.0,
          nb::arg("frequency_penalty") = 0.0, nb::arg("seed") = 0, nb::arg("top_logprobs") = 0)
      .def("observe", &observe, nb::arg("tokens"), "Adds tokens to the history that penalties look at.")
      .def("sample", &sample_row, nb::arg("logits"), "The next token for logits float32 [vocab].")
      .def("top", &Sampler::top, "The likeliest tokens of the last step: [(id, raw log-probability)].")
      .def_prop_ro("logprob", &Sampler::logprob, "Raw log-probability of the last chosen token.");
}

}  // namespace

void bind_decoder(nb::module_& m) {
  bind_spec(m);
  bind_sampler(m);

  nb::class_<BoundDecoder>(m, "Decoder", "A decoder-only transformer: all layers of a step in one call.")
      .def(
          "__init__",
          [](BoundDecoder* self, const DecoderSpec& spec) { new (self) BoundDecoder{Decoder(spec), {}}; },
          nb::arg("spec"))
      .def(
          "set_matrix",
          [](BoundDecoder& self, const std::string& name, nb::object matrix) {
            BoundMatrix* bound = nullptr;
            if (matrix.is_none() || !nb::try_cast(matrix, bound, false) || !bound)
              throw nb::type_error("Decoder.set_matrix: expected a Matrix");
            self.decoder.set_matrix(name, &bound->matrix);
            self.matrices.push_back(matrix);
          },
          nb::arg("name"), nb::arg("matrix"),
          "Names: embed, head, layers.N.q|k|v|o|gate|up|down. The matrix is kept alive, not copied.")
      .def(
          "set_vector",
          [](BoundDecoder& self, const std::string& name, FloatVector values) {
            self.decoder.set_vector(name, values.data(), values.shape(0));
          },
          nb::arg("name"), nb::arg("values"),
          "Names: norm, layers.N.input_norm|post_norm|q_norm|k_norm|attn_sub_norm|ffn_sub_norm|"
          "q_bias|k_bias|v_bias|o_bias|gate_bias|up_bias|down_bias. Copied.")
      .def(
          "set_rope",
          [](BoundDecoder& self, FloatVector inverse_frequencies, float attention_factor,
             const std::vector<bool>& layer_mask) {
            self.decoder.set_rope(inverse_frequencies.data(), inverse_frequencies.shape(0), attention_factor,
                                  layer_mask);
          },
          nb::arg("inverse_frequencies"), nb::arg("attention_factor"), nb::arg("layer_mask"))
      .def(
          "set_windows",
          [](BoundDecoder& self, const std::vector<int64_t>& windows) { self.decoder.set_windows(windows); },
          nb::arg("windows"), "Positions that a query sees, itself included, per layer; 0: all.")
      .def(
          "finish", [](BoundDecoder& self) { self.decoder.finish(); }, "Checks that nothing is missing.")
      .def("logits", &logits, nb::arg("tokens"), nb::arg("caches"), nb::arg("counts"), nb::arg("all") = false,
           "Appends counts[i] tokens to caches[i]; float32 [runs, vocab] of the last tokens, or [tokens, "
           "vocab].")
      .def("sample", &sample, nb::arg("tokens"), nb::arg("caches"), nb::arg("counts"), nb::arg("samplers"),
           "Appends tokens and samples the next of each run: (int32 [runs], raw log-probabilities [runs]).")
      .def("score", &score, nb::arg("tokens"), nb::arg("cache"),
           "Appends tokens; float32 [tokens - 1] log-probability of each token after the first.");

  nb::class_<KvCache>(m, "KvCache", "Keys and values of one sequence; memory is taken as it grows.")
      .def(
          "__init__",
          [](KvCache* self, const BoundDecoder& decoder, size_t capacity) {
            new (self) KvCache(decoder.decoder.spec().kv_shape(), capacity);
          },
          nb::arg("decoder"), nb::arg("capacity"))
      .def_prop_ro("length", &KvCache::length)
      .def_prop_ro("capacity", &KvCache::capacity)
      .def_prop_ro("nbytes", &KvCache::bytes, "Bytes of all `capacity` positions once they are written.")
      .def("truncate", &KvCache::truncate, nb::arg("length"), "Forgets the positions from `length` on.");
}
