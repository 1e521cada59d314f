#include "engine/cuda/llama_weights_cuda.h"

#include <utility>

#include "engine/cuda/kernels.h"
#include "engine/rope.h"

namespace kvrelay::engine::cuda {
namespace {

// Copies numbers to the device and makes them the arithmetic's there. On the default stream.
class Uploader {
 public:
  explicit Uploader(DType dtype) : dtype_(dtype) {}

  static Result<DeviceBuffer<float>> Vector(std::span<const float> values) {
    if (values.empty()) return DeviceBuffer<float>();
    KVRELAY_ASSIGN_OR_RETURN(DeviceBuffer<float> out,
                             AllocateDevice<float>(values.size(), "a vector of the model"));
    KVRELAY_RETURN_IF_ERROR(Copy(values, out.get()));
    return out;
  }

  Result<DeviceBuffer<std::byte>> Weights(std::span<const float> values) {
    KVRELAY_ASSIGN_OR_RETURN(
        DeviceBuffer<std::byte> out,
        AllocateDevice<std::byte>(values.size() * SizeOf(dtype_), "a matrix of the model"));
    if (staged_ < values.size()) {
      staging_.reset();
      KVRELAY_ASSIGN_OR_RETURN(staging_, AllocateDevice<float>(values.size(), "loading a matrix"));
      staged_ = values.size();
    }
    KVRELAY_RETURN_IF_ERROR(Copy(values, staging_.get()));
    KVRELAY_RETURN_IF_ERROR(Narrow(dtype_, staging_.get(), values.size(), out.get(), nullptr));
    return out;
  }

  Result<LinearCuda> Layer(const Linear& linear) {
    LinearCuda out{.outputs = static_cast<uint32_t>(linear.weights.rows),
                   .inputs = static_cast<uint32_t>(linear.weights.columns)};
    KVRELAY_ASSIGN_OR_RETURN(out.weights, Weights(linear.weights.values));
    KVRELAY_ASSIGN_OR_RETURN(out.bias, Vector(linear.bias));
    return out;
  }

 private:
  static Status Copy(std::span<const float> values, float* to) {
    return CudaStatus(cudaMemcpy(to, values.data(), values.size_bytes(), cudaMemcpyHostToDevice),
                      "loading the model");
  }

  const DType dtype_;
  DeviceBuffer<float> staging_;
  size_t staged_ = 0;
};

Result<LlamaLayerCuda> UploadLayer(Uploader& to, const LlamaLayer& layer) {
  LlamaLayerCuda out;
  KVRELAY_ASSIGN_OR_RETURN(out.input_norm, Uploader::Vector(layer.input_norm));
  KVRELAY_ASSIGN_OR_RETURN(out.qkv, to.Layer(layer.qkv));
  KVRELAY_ASSIGN_OR_RETURN(out.q_norm, Uploader::Vector(layer.q_norm));
  KVRELAY_ASSIGN_OR_RETURN(out.k_norm, Uploader::Vector(layer.k_norm));
  KVRELAY_ASSIGN_OR_RETURN(out.o, to.Layer(layer.o));
  KVRELAY_ASSIGN_OR_RETURN(out.post_norm, Uploader::Vector(layer.post_norm));
  KVRELAY_ASSIGN_OR_RETURN(out.gate_up, to.Layer(layer.gate_up));
  KVRELAY_ASSIGN_OR_RETURN(out.down, to.Layer(layer.down));
  return out;
}

}  // namespace

Result<LlamaWeightsCuda> LlamaWeightsCuda::Load(const ModelConfig& config,
                                                const Checkpoint& checkpoint,
                                                const LlamaSplit& split, const Matrix& embedding,
                                                DType dtype) {
  LlamaWeightsCuda out;
  Uploader to(dtype);
  if (split.first_stage() || (split.last_stage() && config.tie_word_embeddings)) {
    KVRELAY_ASSIGN_OR_RETURN(out.embedding, to.Weights(embedding.values));
  }
  for (uint32_t layer = split.kv.layer_begin; layer < split.kv.layer_end(); ++layer) {
    KVRELAY_ASSIGN_OR_RETURN(const LlamaLayer loaded,
                             LoadLlamaLayer(config, checkpoint, layer, split));
    KVRELAY_ASSIGN_OR_RETURN(LlamaLayerCuda uploaded, UploadLayer(to, loaded));
    out.layers.push_back(std::move(uploaded));
  }
  KVRELAY_ASSIGN_OR_RETURN(out.inverse_frequencies,
                           Uploader::Vector(InverseFrequencies(config.rope, config.head_dim)));
  if (split.last_stage()) {
    KVRELAY_ASSIGN_OR_RETURN(const LlamaHead head, LoadLlamaHead(config, checkpoint, split));
    KVRELAY_ASSIGN_OR_RETURN(out.final_norm, Uploader::Vector(head.norm));
    if (config.tie_word_embeddings) {
      out.head =
          out.embedding.get() + size_t{split.vocab_begin} * config.hidden_size * SizeOf(dtype);
    } else {
      KVRELAY_ASSIGN_OR_RETURN(out.own_head, to.Weights(head.own.values));
      out.head = out.own_head.get();
    }
  }
  // Streams of ours do not wait for the default one.
  KVRELAY_RETURN_IF_ERROR(CudaStatus(cudaDeviceSynchronize(), "loading the model"));
  return out;
}

}  // namespace kvrelay::engine::cuda
