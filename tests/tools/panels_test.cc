#include "tools/common/panels.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace kvrelay::tools {
namespace {

using ::testing::ElementsAre;

TEST(WrapTest, BreaksAtBlanksAndKeepsNewlines) {
  EXPECT_THAT(Wrap("To be, or not to be:\nthat", 10),
              ElementsAre("To be, or", "not to be:", "that"));
  EXPECT_THAT(Wrap("", 10), ElementsAre(""));
}

TEST(WrapTest, LongWordsAreCutBetweenCharacters) {
  EXPECT_THAT(Wrap("ääääää", 4), ElementsAre("ääää", "ää"));
}

TEST(WrapTest, ControlCharactersCannotReachTheTerminal) {
  EXPECT_THAT(Wrap("a\033[2Jb\tc\x7f", 80), ElementsAre("a [2Jb c "));
}

TEST(Panels, StandSideBySideWhereThereIsRoom) {
  const auto lines = LayOutPanels({{"[1]", "one"}, {"[2]", "a\nb\nc"}}, 80, 4);
  EXPECT_THAT(lines, ElementsAre("[1]                                      [2]",
                                 "one                                      b",
                                 "                                         c", ""));
}

TEST(Panels, StandOneBelowTheOtherWhereThereIsNone) {
  const auto lines = LayOutPanels({{"[1]", "one"}, {"[2]", "two"}}, 40, 6);
  EXPECT_THAT(lines, ElementsAre("[1]", "one", "", "[2]", "two", ""));
}

TEST(Panels, TakeNoMoreLinesThanTheirTexts) {
  EXPECT_THAT(LayOutPanels({{"[1]", "a\nb"}}, 40, 1000), ElementsAre("[1]", "a", "b", ""));
  EXPECT_THAT(LayOutPanels({}, 40, 1000), ElementsAre());
}

}  // namespace
}  // namespace kvrelay::tools
