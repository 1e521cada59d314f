#include "kvcache/pull_frontier.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <map>
#include <optional>
#include <random>
#include <utility>

namespace kvrelay {
namespace {

TEST(PullFrontierTest, AFinishedPromptIsOnePiece) {
  const PullPiece all{0, 8, {16, 300}};
  PullFrontier frontier(all);
  EXPECT_FALSE(frontier.complete());
  EXPECT_EQ(frontier.Next({.tokens = 300, .chunk_end = 300, .layers = 0}), all);
  EXPECT_TRUE(frontier.complete());
  EXPECT_EQ(frontier.Next({.tokens = 300, .chunk_end = 300, .layers = 0}), std::nullopt);
}

TEST(PullFrontierTest, LayersOfTheChunkInWorkComeAsTheyAreDone) {
  PullFrontier frontier({0, 4, {0, 200}});
  EXPECT_EQ(frontier.Next({}), std::nullopt);
  EXPECT_EQ(frontier.Next({.tokens = 0, .chunk_end = 128, .layers = 1}),
            (PullPiece{0, 1, {0, 128}}));
  EXPECT_EQ(frontier.Next({.tokens = 0, .chunk_end = 128, .layers = 1}), std::nullopt);
  EXPECT_EQ(frontier.Next({.tokens = 0, .chunk_end = 128, .layers = 3}),
            (PullPiece{1, 3, {0, 128}}));
  EXPECT_EQ(frontier.Next({.tokens = 128, .chunk_end = 200, .layers = 0}),
            (PullPiece{3, 4, {0, 128}}));
  EXPECT_EQ(frontier.Next({.tokens = 200, .chunk_end = 200, .layers = 0}),
            (PullPiece{0, 4, {128, 200}}));
  EXPECT_TRUE(frontier.complete());
}

TEST(PullFrontierTest, KeepsToItsLayersAndTokens) {
  PullFrontier frontier({2, 4, {50, 60}});
  EXPECT_EQ(frontier.Next({.tokens = 0, .chunk_end = 100, .layers = 2}), std::nullopt);
  EXPECT_EQ(frontier.Next({.tokens = 0, .chunk_end = 100, .layers = 3}),
            (PullPiece{2, 3, {50, 60}}));
  EXPECT_EQ(frontier.Next({.tokens = 55, .chunk_end = 100, .layers = 0}),
            (PullPiece{3, 4, {50, 55}}));
  EXPECT_FALSE(frontier.complete());
  EXPECT_EQ(frontier.Next({.tokens = 100, .chunk_end = 100, .layers = 0}),
            (PullPiece{3, 4, {55, 60}}));
  EXPECT_TRUE(frontier.complete());
}

TEST(PullFrontierTest, PiecesAreWholePages) {
  PullFrontier frontier({0, 1, {16, 60}}, 16);
  EXPECT_EQ(frontier.Next({.tokens = 31, .chunk_end = 31, .layers = 0}), std::nullopt);
  EXPECT_EQ(frontier.Next({.tokens = 50, .chunk_end = 50, .layers = 0}),
            (PullPiece{0, 1, {16, 48}}));
  EXPECT_EQ(frontier.Next({.tokens = 70, .chunk_end = 70, .layers = 0}),
            (PullPiece{0, 1, {48, 60}}));
  EXPECT_TRUE(frontier.complete());
}

TEST(PullFrontierTest, NothingTwiceNothingBeforeItIsComputedNothingForgotten) {
  const char* given = std::getenv("KVRELAY_SEED");
  const uint64_t first = given != nullptr ? std::strtoull(given, nullptr, 10) : 0;
  for (uint64_t seed = first; seed < first + (given != nullptr ? 1 : 2000); ++seed) {
    SCOPED_TRACE("KVRELAY_SEED=" + std::to_string(seed));
    std::mt19937_64 random(seed);
    const auto below = [&](uint64_t n) { return static_cast<uint32_t>(random() % n); };
    const uint32_t layers = 1 + below(6);
    const uint32_t prompt = 1 + below(40);
    PullPiece all;
    all.layer_begin = below(layers);
    all.layer_end = all.layer_begin + 1 + below(layers - all.layer_begin);
    all.tokens.begin = below(prompt);
    all.tokens.end = all.tokens.begin + 1 + below(prompt - all.tokens.begin);
    PullFrontier frontier(all);
    std::map<std::pair<uint32_t, uint32_t>, int> copied;  // (layer, token)
    const auto look = [&](const Progress& progress) {
      while (const auto piece = frontier.Next(progress)) {
        for (uint32_t layer = piece->layer_begin; layer < piece->layer_end; ++layer) {
          for (uint32_t token = piece->tokens.begin; token < piece->tokens.end; ++token) {
            ASSERT_EQ(++copied[std::make_pair(layer, token)], 1);
            ASSERT_TRUE(Covers(progress, {.tokens = token + 1, .layers = layer + 1}))
                << "layer " << layer << " token " << token;
          }
        }
        if (below(3) == 0) break;  // not everything is taken at once
      }
    };
    for (uint32_t done = 0; done < prompt;) {
      const uint32_t end = done + 1 + below(prompt - done);
      for (uint32_t layer = 0; layer < layers; ++layer) {
        if (below(2) == 0) look({.tokens = done, .chunk_end = end, .layers = layer});
        if (HasFatalFailure()) return;
      }
      done = end;
    }
    EXPECT_EQ(frontier.complete(),
              copied.size() == uint64_t{all.layer_end - all.layer_begin} * all.tokens.size());
    while (!frontier.complete()) look({.tokens = prompt, .chunk_end = prompt, .layers = 0});
    EXPECT_EQ(copied.size(), uint64_t{all.layer_end - all.layer_begin} * all.tokens.size());
  }
}

}  // namespace
}  // namespace kvrelay
