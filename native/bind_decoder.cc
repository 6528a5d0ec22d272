// Python's view of the decoder and its caches. Arguments become plain C++ here; ranges and sizes are checked
// by the classes themselves.
#include "bind_decoder.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>

#include "bind_matrix.h"

using namespace lowbit;

namespace {

// Names of the values of an enumeration, in its order.
const std::vector<std::string> kActivations = {"silu", "relu2", "gelu_tanh",
                                               "gelu", "relu",  "swiglu_clamped"};
const std::vector<std::string> kNorms = {"rms", "layer"};
const std::vector<std::string> kNormPlaces = {"pre", "post", "sandwich"};
const std::vector<std::string> kPositions = {"rope", "learned"};

// An attribute of DecoderSpec that Python sees as one of `names`.
template <typename T>
void bind_choice(nb::class_<DecoderSpec>& spec, const char* field, T DecoderSpec::* member,
                 const std::vector<std::string>& names) {
  spec.def_prop_rw(
      field, [member, &names](const DecoderSpec& s) { return names[static_cast<size_t>(s.*member)]; },
      [member, &names, field](DecoderSpec& s, const std::string& name) {
        std::string known;
        for (size_t i = 0; i < names.size(); ++i) {
          if (name == names[i]) {
            s.*member = static_cast<T>(i);
            return;
          }
          known += (i ? ", " : "") + names[i];
        }
        throw nb::value_error(
            (std::string("DecoderSpec: ") + field + " '" + name + "' is not one of " + known).c_str());
      });
}

void bind_spec(nb::module_& m) {
  nb::class_<DecoderSpec> spec(m, "DecoderSpec", "Shape of a decoder; plain attributes.");
  bind_choice(spec, "activation", &DecoderSpec::activation, kActivations);
  bind_choice(spec, "norm", &DecoderSpec::norm, kNorms);
  bind_choice(spec, "norm_place", &DecoderSpec::norm_place, kNormPlaces);
  bind_choice(spec, "positions", &DecoderSpec::learned_positions, kPositions);
  spec.def(nb::init<>())
      .def_rw("n_layers", &DecoderSpec::n_layers)
      .def_rw("hidden_size", &DecoderSpec::hidden_size)
      .def_rw("intermediate_size", &DecoderSpec::intermediate_size)
      .def_rw("n_heads", &DecoderSpec::n_heads)
      .def_rw("n_kv_heads", &DecoderSpec::n_kv_heads)
      .def_rw("head_dim", &DecoderSpec::head_dim)
      .def_rw("vocab_size", &DecoderSpec::vocab_size)
      .def_rw("norm_eps", &DecoderSpec::norm_eps)
      .def_rw("gated", &DecoderSpec::gated)
      .def_rw("qk_norm", &DecoderSpec::qk_norm)
      .def_rw("qk_norm_whole", &DecoderSpec::qk_norm_whole)
      .def_rw("parallel", &DecoderSpec::parallel)
      .def_rw("position_offset", &DecoderSpec::position_offset)
      .def_rw("embedding_scale", &DecoderSpec::embedding_scale)
      .def_rw("attention_softcap", &DecoderSpec::attention_softcap)
      .def_rw("logit_softcap", &DecoderSpec::logit_softcap)
      .def_rw("sinks", &DecoderSpec::sinks)
      .def_rw("sub_norm", &DecoderSpec::sub_norm)
      .def_rw("attention_scale", &DecoderSpec::attention_scale)
      .def_rw("activation_bits", &DecoderSpec::activation_bits)
      .def_rw("kv_bits", &DecoderSpec::kv_bits)
      .def_rw("rotary_dim", &DecoderSpec::rotary_dim)
      .def_rw("n_experts", &DecoderSpec::n_experts)
      .def_rw("experts_per_token", &DecoderSpec::experts_per_token)
      .def_rw("expert_size", &DecoderSpec::expert_size)
      .def_prop_rw(
          "router_order",
          [](const DecoderSpec& s) {
            return s.router_order == RouterOrder::softmax_topk ? "softmax_topk" : "topk_softmax";
          },
          [](DecoderSpec& s, const std::string& name) {
            if (name != "softmax_topk" && name != "topk_softmax")
              throw nb::value_error(
                  ("DecoderSpec: router_order '" + name + "' is not one of softmax_topk, topk_softmax")
                      .c_str());
            s.router_order = name == "softmax_topk" ? RouterOrder::softmax_topk : RouterOrder::topk_softmax;
          })
      .def_rw("router_renormalize", &DecoderSpec::router_renormalize)
      .def_rw("sparse_layers", &DecoderSpec::sparse_layers);
}

}  // namespace

void bind_decoder(nb::module_& m) {
  bind_spec(m);
  bind_sampler(m);

  nb::class_<BoundDecoder> decoder(m, "Decoder",
                                   "A decoder-only transformer: all layers of a step in one call.");
  decoder
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
          "Names: embed, head, positions, layers.N.q|k|v|o|gate|up|down. The matrix is kept alive, not "
          "copied.")
      .def(
          "set_vector",
          [](BoundDecoder& self, const std::string& name, FloatVector values) {
            self.decoder.set_vector(name, values.data(), values.shape(0));
          },
          nb::arg("name"), nb::arg("values"),
          "Names: norm, norm_bias, layers.N.input_norm|input_norm_bias|attn_out_norm|post_norm|"
          "post_norm_bias|mlp_out_norm|q_norm|k_norm|attn_sub_norm|ffn_sub_norm|sinks|"
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
          "set_local_rope",
          [](BoundDecoder& self, FloatVector inverse_frequencies, float attention_factor,
             const std::vector<bool>& layer_mask) {
            self.decoder.set_local_rope(inverse_frequencies.data(), inverse_frequencies.shape(0),
                                        attention_factor, layer_mask);
          },
          nb::arg("inverse_frequencies"), nb::arg("attention_factor"), nb::arg("layer_mask"),
          "Another rotation for some of the layers that rotate.")
      .def(
          "set_windows",
          [](BoundDecoder& self, const std::vector<int64_t>& windows) { self.decoder.set_windows(windows); },
          nb::arg("windows"), "Positions that a query sees, itself included, per layer; 0: all.")
      .def(
          "finish", [](BoundDecoder& self) { self.decoder.finish(); }, "Checks that nothing is missing.")
      .def(
          "start_profile", [](BoundDecoder& self) { self.decoder.start_profile(); },
          "From here on, the time of steps is kept by phase.")
      .def(
          "stop_profile",
          [](BoundDecoder& self) {
            const StepProfile profile = self.decoder.stop_profile();
            nb::dict phases;
            for (size_t i = 0; i < kPhaseNames.size(); ++i) phases[kPhaseNames[i]] = profile.phases[i];
            return nb::make_tuple(profile.steps, profile.seconds, phases);
          },
          "(steps, seconds of all, {phase: seconds}) since start_profile(). What no phase has is planning.");
  bind_steps(m, decoder);
}
