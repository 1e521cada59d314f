#include "engine/checkpoint.h"

#include <algorithm>

#include "base/parallel.h"
#include "engine/dummy_weights.h"
#include "engine/json_fields.h"
#include "engine/model_file.h"
#include "engine/widen.h"

namespace kvrelay::engine {
namespace {

constexpr uint64_t kMaxIndexBytes = 100'000'000;
constexpr const char* kSingleFile = "/model.safetensors";
constexpr const char* kIndexFile = "/model.safetensors.index.json";

// Tensor name -> file name, checked: plain file names only.
Result<std::map<std::string, std::string>> ReadIndex(const std::string& path) {
  KVRELAY_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, kMaxIndexBytes));
  KVRELAY_ASSIGN_OR_RETURN(const JsonFields index, JsonFields::Parse(text, path));
  KVRELAY_ASSIGN_OR_RETURN(const std::optional<JsonFields> weights, index.Object("weight_map"));
  if (!weights) return Error(index.Refuse("weight_map", "is required"));
  std::map<std::string, std::string> files;
  for (const auto& [name, value] : weights->object().items()) {
    const std::string file = value.is_string() ? value.get<std::string>() : std::string();
    if (file.empty() || file.find('/') != std::string::npos ||
        file.find('\0') != std::string::npos) {
      return Error(weights->Refuse(name, "is not the name of a file in the same folder"));
    }
    files.emplace(name, file);
  }
  return files;
}

}  // namespace

Result<Checkpoint> Checkpoint::Open(const std::string& model_dir) {
  Checkpoint checkpoint;
  Result<TensorFile> single = TensorFile::Open(model_dir + kSingleFile);
  if (single) {
    checkpoint.files_.push_back(std::move(single).value());
    for (const auto& [name, info] : checkpoint.files_[0].tensors()) {
      checkpoint.tensors_.emplace(name, &info);
    }
    return checkpoint;
  }
  if (single.error().code() != Code::kNotFound) return Error(std::move(single).error());

  auto index = ReadIndex(model_dir + kIndexFile);
  if (!index && index.error().code() == Code::kNotFound) {
    return Error(Code::kNotFound, model_dir +
                                      " holds neither model.safetensors nor "
                                      "model.safetensors.index.json");
  }
  if (!index) return Error(std::move(index).error());
  std::map<std::string, size_t> number;
  for (const auto& [name, file] : *index) {
    if (number.contains(file)) continue;
    KVRELAY_ASSIGN_OR_RETURN(TensorFile opened, TensorFile::Open(model_dir + "/" + file));
    number.emplace(file, checkpoint.files_.size());
    checkpoint.files_.push_back(std::move(opened));
  }
  for (const auto& [name, file] : *index) {
    const TensorFile& shard = checkpoint.files_[number[file]];
    const auto it = shard.tensors().find(name);
    if (it == shard.tensors().end()) {
      return Error(Code::kInvalidArgument,
                   shard.path() + " lacks tensor " + name + ", which the index places there");
    }
    checkpoint.tensors_.emplace(name, &it->second);
  }
  return checkpoint;
}

Checkpoint Checkpoint::Dummy() {
  Checkpoint checkpoint;
  checkpoint.dummy_ = true;
  return checkpoint;
}

Result<const TensorInfo*> Checkpoint::Find(const std::string& name,
                                           const std::vector<uint64_t>& shape) const {
  const auto it = tensors_.find(name);
  if (it == tensors_.end()) {
    return Error(Code::kInvalidArgument, "the checkpoint lacks tensor " + name);
  }
  const TensorInfo* info = it->second;
  if (info->shape != shape) {
    TensorInfo want = *info;
    want.shape = shape;
    return Error(Code::kInvalidArgument, "tensor " + name + " is " + info->ToString() +
                                             ", but the configuration asks for " + want.ToString());
  }
  if (info->type == TensorType::kOther) {
    return Error(Code::kInvalidArgument,
                 "tensor " + name + " is " + info->ToString() + "; supported are F32, F16, BF16");
  }
  return info;
}

Status Checkpoint::ReadMatrix(const std::string& name, uint64_t all_rows, uint64_t all_columns,
                              const Box& box, std::span<float> out) const {
  if (dummy_) {
    constexpr size_t kRowGrain = 16;
    const DummyWeights weights(name);
    ParallelFor(box.rows, kRowGrain, [&](size_t begin, size_t end) {
      for (size_t row = begin; row < end; ++row) {
        weights.Fill((box.row_begin + row) * all_columns + box.column_begin,
                     out.subspan(row * box.columns, box.columns));
      }
    });
    return Status::Ok();
  }
  KVRELAY_ASSIGN_OR_RETURN(const TensorInfo* info, Find(name, {all_rows, all_columns}));
  if (box.row_begin + box.rows > all_rows || box.column_begin + box.columns > all_columns ||
      out.size() != box.rows * box.columns) {
    return {Code::kInternal, "tensor " + name + ": the box asked for lies outside"};
  }
  const size_t element = info->data.size() / (all_rows * all_columns);
  for (uint64_t row = 0; row < box.rows; ++row) {
    const uint64_t first = (box.row_begin + row) * all_columns + box.column_begin;
    Widen(info->type, info->data.subspan(first * element, box.columns * element),
          out.subspan(row * box.columns, box.columns));
  }
  return Status::Ok();
}

Status Checkpoint::ReadVector(const std::string& name, std::span<float> out) const {
  if (dummy_) {
    std::ranges::fill(out, 1.0F);
    if (name.ends_with(".bias")) DummyWeights(name).Fill(0, out);
    return Status::Ok();
  }
  KVRELAY_ASSIGN_OR_RETURN(const TensorInfo* info, Find(name, {out.size()}));
  Widen(info->type, info->data, out);
  return Status::Ok();
}

}  // namespace kvrelay::engine
