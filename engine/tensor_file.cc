#include "engine/tensor_file.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "engine/json_fields.h"
#include "engine/model_file.h"

namespace kvrelay::engine {
namespace {

using nlohmann::json;

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit
constexpr size_t kMaxRank = 8;

struct TypeEntry {
  std::string_view name;
  TensorType type;
  uint32_t bytes;
};
constexpr TypeEntry kTypes[] = {
    {"F32", TensorType::kFp32, 4},      {"F16", TensorType::kFp16, 2},
    {"BF16", TensorType::kBf16, 2},     {"F64", TensorType::kOther, 8},
    {"I64", TensorType::kOther, 8},     {"I32", TensorType::kOther, 4},
    {"I16", TensorType::kOther, 2},     {"I8", TensorType::kOther, 1},
    {"U64", TensorType::kOther, 8},     {"U32", TensorType::kOther, 4},
    {"U16", TensorType::kOther, 2},     {"U8", TensorType::kOther, 1},
    {"BOOL", TensorType::kOther, 1},    {"F8_E4M3", TensorType::kOther, 1},
    {"F8_E5M2", TensorType::kOther, 1},
};

// Product of a shape times the element's size; nothing when it does not fit into 63 bits.
std::optional<uint64_t> TensorBytes(const std::vector<uint64_t>& shape, uint32_t element) {
  uint64_t bytes = element;
  for (const uint64_t dim : shape) {
    if (dim != 0 && bytes > (uint64_t{1} << 62) / dim) return std::nullopt;
    bytes *= dim;
  }
  return bytes;
}

Result<std::vector<uint64_t>> ReadUints(const json& entry, const char* field, size_t max_count) {
  const auto it = entry.find(field);
  if (it == entry.end() || !it->is_array() || it->size() > max_count) {
    return Error(Code::kInvalidArgument, std::string("has no valid ") + field);
  }
  std::vector<uint64_t> out;
  for (const json& value : *it) {
    if (!value.is_number_unsigned()) {
      return Error(Code::kInvalidArgument, std::string("has no valid ") + field);
    }
    out.push_back(value.get<uint64_t>());
  }
  return out;
}

Result<TensorInfo> ParseTensor(const json& entry, std::span<const std::byte> data) {
  if (!entry.is_object()) return Error(Code::kInvalidArgument, "is not described by an object");
  const auto dtype = entry.find("dtype");
  if (dtype == entry.end() || !dtype->is_string()) {
    return Error(Code::kInvalidArgument, "has no valid dtype");
  }
  TensorInfo info;
  info.type_name = dtype->get<std::string>();
  const auto* type = std::find_if(std::begin(kTypes), std::end(kTypes),
                                  [&](const TypeEntry& t) { return t.name == info.type_name; });
  if (type == std::end(kTypes)) {
    return Error(Code::kInvalidArgument, "has the unknown dtype " + info.type_name);
  }
  info.type = type->type;
  KVRELAY_ASSIGN_OR_RETURN(info.shape, ReadUints(entry, "shape", kMaxRank));
  KVRELAY_ASSIGN_OR_RETURN(const std::vector<uint64_t> offsets,
                           ReadUints(entry, "data_offsets", 2));
  if (offsets.size() != 2 || offsets[0] > offsets[1]) {
    return Error(Code::kInvalidArgument, "has no valid data_offsets");
  }
  const std::optional<uint64_t> bytes = TensorBytes(info.shape, type->bytes);
  if (!bytes || *bytes != offsets[1] - offsets[0]) {
    return Error(Code::kInvalidArgument, "is " + info.ToString() + ", but its data_offsets span " +
                                             std::to_string(offsets[1] - offsets[0]) + " bytes");
  }
  if (offsets[1] > data.size()) {
    return Error(Code::kInvalidArgument, "ends at byte " + std::to_string(offsets[1]) +
                                             " of the data, of which the file holds only " +
                                             std::to_string(data.size()));
  }
  info.data = data.subspan(offsets[0], *bytes);
  return info;
}

}  // namespace

uint64_t TensorInfo::elements() const {
  uint64_t count = 1;
  for (const uint64_t dim : shape) count *= dim;
  return count;
}

std::string TensorInfo::ToString() const {
  std::string text = type_name + " [";
  for (size_t i = 0; i < shape.size(); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(shape[i]);
  }
  return text + "]";
}

Status TensorFile::ParseHeader(std::string_view header, std::span<const std::byte> data) {
  KVRELAY_ASSIGN_OR_RETURN(const JsonFields fields,
                           JsonFields::Parse(std::string(header), path_ + ": the header"));
  std::vector<std::pair<const std::byte*, const std::byte*>> spans;
  for (const auto& [name, entry] : fields.object().items()) {
    if (name == "__metadata__") continue;
    Result<TensorInfo> info = ParseTensor(entry, data);
    if (!info) return info.error().Wrap(path_ + ": tensor " + name.substr(0, 200));
    spans.emplace_back(info->data.data(), info->data.data() + info->data.size());
    tensors_.emplace(name, std::move(info).value());
  }
  std::sort(spans.begin(), spans.end());
  const std::byte* covered = data.data();
  for (const auto& [begin, end] : spans) {
    if (begin != covered) {
      return {Code::kInvalidArgument,
              path_ + ": tensors " + (begin < covered ? "overlap" : "leave a hole") + " at byte " +
                  std::to_string(begin - data.data()) + " of the data"};
    }
    covered = end;
  }
  if (covered != data.data() + data.size()) {
    return {Code::kInvalidArgument,
            path_ + ": tensors cover " + std::to_string(covered - data.data()) +
                " bytes of data, but the file holds " + std::to_string(data.size())};
  }
  return Status::Ok();
}

Result<TensorFile> TensorFile::Open(const std::string& path) {
  TensorFile file;
  file.path_ = path;
  KVRELAY_ASSIGN_OR_RETURN(const RegularFile opened, OpenRegularFile(path));
  const uint64_t bytes = opened.bytes;
  uint64_t header_bytes = 0;
  if (bytes < sizeof(header_bytes)) {
    return Error(Code::kInvalidArgument,
                 path + " has " + std::to_string(bytes) + " bytes, too few for a header");
  }
  KVRELAY_ASSIGN_OR_RETURN(file.mapping_,
                           Mapping::Map(bytes, PROT_READ, MAP_PRIVATE, opened.fd.get()));
  const std::span<const std::byte> all(file.mapping_.data(), bytes);
  std::memcpy(&header_bytes, all.data(), sizeof(header_bytes));
  if (header_bytes > kMaxHeaderBytes || header_bytes > bytes - sizeof(header_bytes)) {
    return Error(Code::kInvalidArgument,
                 path + ": the header claims " + std::to_string(header_bytes) +
                     " bytes, but the file has " + std::to_string(bytes) +
                     " (and a header at most " + std::to_string(kMaxHeaderBytes) + ")");
  }
  const std::string_view header(reinterpret_cast<const char*>(all.data()) + sizeof(header_bytes),
                                header_bytes);
  KVRELAY_RETURN_IF_ERROR(
      file.ParseHeader(header, all.subspan(sizeof(header_bytes) + header_bytes)));
  return file;
}

}  // namespace kvrelay::engine
