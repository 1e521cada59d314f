// Text for models that read bytes. Other models take token ids only; their text is refused clearly.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "engine/model_config.h"

namespace kvrelay::engine {

// The prompt of one request: the system ids followed by the token ids.
struct PromptIds {
  std::vector<uint32_t> system_ids;
  std::vector<uint32_t> token_ids;
};

class Tokenizer {
 public:
  // Reads tokenizer_config.json: ByT5Tokenizer gives a byte-level codec (id = byte + 3), any other
  // class or no file one that refuses text. kInvalidArgument when the file is damaged or the
  // vocabulary is too small for bytes.
  static Result<Tokenizer> Load(const std::string& model_dir, const ModelConfig& config);
  // What Load makes of a ByT5Tokenizer.
  static Tokenizer ByteLevel(std::optional<uint32_t> bos_id);

  bool has_text() const { return byte_level_; }
  // Adds the model's bos id once, at the very front: it belongs to the prefix and is not repeated.
  // kInvalidArgument when the model has no text codec.
  Result<PromptIds> Encode(std::string_view system, std::string_view prompt) const;

 private:
  friend class TextStream;
  bool byte_level_ = false;
  std::string class_name_;  // for the refusal; empty: no tokenizer_config.json
  std::optional<uint32_t> bos_id_;
};

// Turns one request's ids into text as they come. Gives complete UTF-8 sequences only: bytes of an
// unfinished one are kept back, bytes that can never be part of one become U+FFFD. Ids that stand
// for no byte (eos, bos, padding) give nothing.
class TextStream {
 public:
  explicit TextStream(const Tokenizer& tokenizer) : byte_level_(tokenizer.byte_level_) {}

  // The text that is complete now; always empty for models without a text codec.
  std::string Add(std::span<const uint32_t> ids);
  // What is left at the end, an unfinished sequence as U+FFFD.
  std::string Finish();

 private:
  bool byte_level_;
  std::string pending_;  // a proper beginning of one UTF-8 sequence
};

}  // namespace kvrelay::engine
