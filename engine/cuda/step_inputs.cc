#include "engine/cuda/step_inputs.h"

#include <algorithm>
#include <string>

#include "engine/cuda/kernels.h"

namespace kvrelay::engine::cuda {

using attention::cuda::kNoPrefix;

Result<StepInputs> StepInputs::Create(const StepLimits& limits) {
  StepInputs inputs;
  inputs.limits_ = limits;
  size_t end = 0;
  for (uint32_t array = 0; array < kArrays; ++array) {
    inputs.offsets_[array] = end;
    const bool by_row = array == kTokens || array == kPositions || array == kBlocks;
    const size_t count = by_row ? limits.rows : limits.sequences + (array == kFirstRows ? 1 : 0);
    end += (count + 63) / 64 * 64;
  }
  inputs.offsets_[kArrays] = end;
  const size_t all = end + 2 * size_t{limits.sequences} * limits.blocks;
  KVRELAY_ASSIGN_OR_RETURN(inputs.device_, AllocateDevice<uint32_t>(all, "a step's numbers"));
  KVRELAY_ASSIGN_OR_RETURN(inputs.host_, AllocatePinned<uint32_t>(all, "a step's numbers"));
  return inputs;
}

attention::cuda::PagedBatch StepInputs::batch(bool single_rows) const {
  const uint32_t* tables = At(kArrays);
  return {.requests = {.contexts = At(kContexts),
                       .prefixes = At(kPrefixes),
                       .blocks = tables,
                       .blocks_stride = limits_.blocks,
                       .prefix_tokens = At(kPrefixTokens),
                       .prefix_blocks = tables + size_t{limits_.sequences} * limits_.blocks,
                       .prefix_blocks_stride = limits_.blocks},
          .first_rows = single_rows ? nullptr : At(kFirstRows)};
}

void StepInputs::FillRows(const StepRows& step, uint32_t padded_rows) {
  const auto rows = static_cast<uint32_t>(step.token_ids.size());
  const auto fill = [&](Array array, std::span<const uint32_t> from, uint32_t padding) {
    std::fill(std::ranges::copy(from, Host(array)).out, Host(array) + padded_rows, padding);
  };
  fill(kTokens, step.token_ids, 0);
  fill(kPositions, step.positions, 0);
  fill(kBlocks, step.blocks, kNoBlock);
  uint32_t* const logit_rows = Host(kLogitRows);
  std::ranges::copy(step.logit_rows, logit_rows);
  for (auto i = static_cast<uint32_t>(step.logit_rows.size()); i < limits_.sequences; ++i) {
    logit_rows[i] = std::min(i, padded_rows - 1);
  }
  for (uint32_t s = 0; s < limits_.sequences; ++s) {
    const bool used = s < step.sequences.size();
    Host(kContexts)[s] = used ? step.sequences[s].context : 0;
    Host(kFirstRows)[s] = used ? step.sequences[s].first_row : rows;
  }
  Host(kFirstRows)[limits_.sequences] = rows;
}

// The longest, in blocks.
uint32_t StepInputs::FillPrefixes(const StepRows& step) {
  std::fill_n(Host(kPrefixes), limits_.sequences, kNoPrefix);
  std::fill_n(Host(kPrefixTokens), limits_.sequences, 0);
  if (step.relay == nullptr) return 0;
  uint32_t longest = 0;
  uint32_t prefix = 0;
  for (const auto& group : step.relay->groups) {
    if (group.level > 0) continue;
    const auto blocks = static_cast<uint32_t>(group.prefix.size());
    uint32_t* const table =
        host_.get() + offsets_[kArrays] + (size_t{limits_.sequences} + prefix) * limits_.blocks;
    std::ranges::copy(group.prefix, table);
    Host(kPrefixTokens)[prefix] = blocks * limits_.block_size;
    for (const uint32_t sequence : group.sequences) Host(kPrefixes)[sequence] = prefix;
    longest = std::max(longest, blocks);
    ++prefix;
  }
  return longest;
}

// The longest, in blocks.
uint32_t StepInputs::FillTables(const StepRows& step) {
  uint32_t longest = 0;
  for (uint32_t s = 0; s < step.sequences.size(); ++s) {
    const attention::Sequence& sequence = step.sequences[s];
    const uint32_t prefix = Host(kPrefixes)[s];
    const uint32_t shared =
        prefix == kNoPrefix ? 0 : Host(kPrefixTokens)[prefix] / limits_.block_size;
    uint32_t* const table = host_.get() + offsets_[kArrays] + size_t{s} * limits_.blocks;
    const uint32_t needed =
        (sequence.context + limits_.block_size - 1) / limits_.block_size - shared;
    const auto rest = sequence.prefix.subspan(shared);
    uint32_t* const end = std::ranges::copy(rest, table).out;
    const size_t own = needed - rest.size();
    std::ranges::copy(sequence.blocks.first(own), end);
    longest = std::max(longest, needed);
  }
  return longest;
}

Status StepInputs::Upload(const StepRows& step, uint32_t padded_rows, cudaStream_t stream) {
  const auto check = [](const char* what, size_t count, size_t limit) -> Status {
    if (count <= limit) return Status::Ok();
    return {Code::kTooLarge, "a step of " + std::to_string(count) + " " + what +
                                 "; the GPU's buffers hold " + std::to_string(limit)};
  };
  KVRELAY_RETURN_IF_ERROR(check("rows", padded_rows, limits_.rows));
  KVRELAY_RETURN_IF_ERROR(check("sequences", step.sequences.size(), limits_.sequences));
  for (const attention::Sequence& sequence : step.sequences) {
    const uint64_t room = uint64_t{limits_.blocks} * limits_.block_size;
    KVRELAY_RETURN_IF_ERROR(check("tokens in a sequence", sequence.context, room));
  }
  FillRows(step, padded_rows);
  const uint32_t prefix_blocks = FillPrefixes(step);
  const uint32_t blocks = FillTables(step);
  const auto copy = [&](size_t first, size_t width, size_t height) {
    if (width == 0 || height == 0) return Status::Ok();
    const size_t pitch = size_t{limits_.blocks} * sizeof(uint32_t);
    return CudaStatus(
        cudaMemcpy2DAsync(device_.get() + first, pitch, host_.get() + first, pitch,
                          width * sizeof(uint32_t), height, cudaMemcpyHostToDevice, stream),
        "a step's tables");
  };
  const size_t tables = offsets_[kArrays];
  KVRELAY_RETURN_IF_ERROR(
      CudaStatus(cudaMemcpyAsync(device_.get(), host_.get(), tables * sizeof(uint32_t),
                                 cudaMemcpyHostToDevice, stream),
                 "a step's numbers"));
  KVRELAY_RETURN_IF_ERROR(copy(tables, blocks, step.sequences.size()));
  const size_t prefixes = step.relay == nullptr ? 0 : step.relay->groups.size();
  return copy(tables + size_t{limits_.sequences} * limits_.blocks, prefix_blocks, prefixes);
}

}  // namespace kvrelay::engine::cuda
