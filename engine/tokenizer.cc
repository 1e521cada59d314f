#include "engine/tokenizer.h"

#include "engine/json_fields.h"
#include "engine/model_file.h"

namespace kvrelay::engine {
namespace {

constexpr uint32_t kFirstByteId = 3;  // after padding, eos and unknown
constexpr uint64_t kMaxTokenizerConfigBytes = 64U << 20;
constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

// How a byte may continue a UTF-8 sequence (RFC 3629: no overlong forms, no surrogates, nothing
// above U+10FFFF).
struct Lead {
  size_t length = 0;  // of the whole sequence; 0: cannot start one
  uint8_t second_min = 0x80;
  uint8_t second_max = 0xBF;
};

Lead Classify(uint8_t lead) {
  if (lead < 0x80) return {.length = 1};
  if (lead >= 0xC2 && lead <= 0xDF) return {.length = 2};
  if (lead == 0xE0) return {.length = 3, .second_min = 0xA0};
  if (lead == 0xED) return {.length = 3, .second_max = 0x9F};
  if (lead >= 0xE1 && lead <= 0xEF) return {.length = 3};
  if (lead == 0xF0) return {.length = 4, .second_min = 0x90};
  if (lead == 0xF4) return {.length = 4, .second_max = 0x8F};
  if (lead >= 0xF1 && lead <= 0xF3) return {.length = 4};
  return {};
}

bool Continues(const std::string& pending, uint8_t byte) {
  const Lead lead = Classify(static_cast<uint8_t>(pending[0]));
  if (pending.size() == 1) return byte >= lead.second_min && byte <= lead.second_max;
  return byte >= 0x80 && byte <= 0xBF;
}

}  // namespace

Result<Tokenizer> Tokenizer::Load(const std::string& model_dir, const ModelConfig& config) {
  Tokenizer tokenizer;
  const std::string path = model_dir + "/tokenizer_config.json";
  const Result<std::string> text = ReadTextFile(path, kMaxTokenizerConfigBytes);
  if (!text && text.error().code() == Code::kNotFound) return tokenizer;
  if (!text) return Error(text.error());
  KVRELAY_ASSIGN_OR_RETURN(const JsonFields fields, JsonFields::Parse(*text, path));
  KVRELAY_ASSIGN_OR_RETURN(tokenizer.class_name_, fields.StringOr("tokenizer_class", ""));
  if (tokenizer.class_name_ != "ByT5Tokenizer") return tokenizer;
  if (config.vocab_size < kFirstByteId + 256) {
    return Error(Code::kInvalidArgument,
                 path + ": ByT5Tokenizer needs a vocabulary of at least 259 ids, the model has " +
                     std::to_string(config.vocab_size));
  }
  tokenizer.byte_level_ = true;
  tokenizer.bos_id_ = config.bos_id;
  return tokenizer;
}

Tokenizer Tokenizer::ByteLevel(std::optional<uint32_t> bos_id) {
  Tokenizer tokenizer;
  tokenizer.byte_level_ = true;
  tokenizer.class_name_ = "ByT5Tokenizer";
  tokenizer.bos_id_ = bos_id;
  return tokenizer;
}

Result<PromptIds> Tokenizer::Encode(std::string_view system, std::string_view prompt) const {
  if (!byte_level_) {
    const std::string have =
        class_name_.empty() ? "no tokenizer_config.json" : "tokenizer_class " + class_name_;
    return Error(Code::kInvalidArgument,
                 "text needs a model with a byte-level tokenizer (ByT5Tokenizer); this one has " +
                     have + ": give token ids instead");
  }
  PromptIds out;
  const auto append = [](std::string_view bytes, std::vector<uint32_t>& ids) {
    for (const char c : bytes) ids.push_back(static_cast<uint8_t>(c) + kFirstByteId);
  };
  if (bos_id_) (system.empty() ? out.token_ids : out.system_ids).push_back(*bos_id_);
  append(system, out.system_ids);
  append(prompt, out.token_ids);
  return out;
}

std::string TextStream::Add(std::span<const uint32_t> ids) {
  std::string out;
  if (!byte_level_) return out;
  for (const uint32_t id : ids) {
    if (id < kFirstByteId || id >= kFirstByteId + 256) continue;
    const auto byte = static_cast<uint8_t>(id - kFirstByteId);
    if (!pending_.empty() && !Continues(pending_, byte)) {
      out += kReplacement;
      pending_.clear();
    }
    if (pending_.empty() && Classify(byte).length == 0) {
      out += kReplacement;
      continue;
    }
    pending_.push_back(static_cast<char>(byte));
    if (pending_.size() == Classify(static_cast<uint8_t>(pending_[0])).length) {
      out += pending_;
      pending_.clear();
    }
  }
  return out;
}

std::string TextStream::Finish() {
  if (pending_.empty()) return {};
  pending_.clear();
  return std::string(kReplacement);
}

}  // namespace kvrelay::engine
