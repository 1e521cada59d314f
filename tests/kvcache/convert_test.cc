// The conversions against the definition of the formats: values as doubles, and of two neighbours
// the nearer one.
#include "kvcache/convert.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <vector>

#include "kvcache/copy_host_cast.h"
#include "tests/kvcache/seed.h"

namespace kvrelay {
namespace {

using internal::ConvertFn;
using internal::ConvertIsa;
using internal::ConvertIsas;
using testing_support::Random;
using testing_support::TestSeed;

constexpr DType kAll[] = {DType::kFp32,    DType::kFp16,    DType::kBf16,
                          DType::kFp8E4m3, DType::kFp8E5m2, DType::kInt8};

struct Format {
  int exponent;
  int mantissa;
  double largest;
  bool infinities;
};
const std::map<DType, Format> kFloats = {{DType::kFp16, {5, 10, 65504, true}},
                                         {DType::kBf16, {8, 7, 0x1.FEp127, true}},
                                         {DType::kFp8E4m3, {4, 3, 448, false}},
                                         {DType::kFp8E5m2, {5, 2, 57344, true}}};

// The value of a float format's bits, by its definition.
double Value(const Format& f, uint32_t bits) {
  const int bias = (1 << (f.exponent - 1)) - 1;
  const double sign = (bits >> (f.exponent + f.mantissa) & 1) != 0 ? -1 : 1;
  const auto exponent = static_cast<int>(bits >> f.mantissa & ((1U << f.exponent) - 1));
  const double fraction = bits & ((1U << f.mantissa) - 1);
  if (exponent == (1 << f.exponent) - 1) {
    if (f.infinities) return fraction == 0 ? sign * HUGE_VAL : std::nan("");
    if (fraction == (1 << f.mantissa) - 1) return std::nan("");
  }
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - f.mantissa);
  return sign * std::ldexp(fraction + (1 << f.mantissa), exponent - bias - f.mantissa);
}

// The nearest value of the format, ties to even; saturating.
double Nearest(const Format& f, double value) {
  if (std::isnan(value) || value == 0) return value;
  const int least = 2 - (1 << (f.exponent - 1));
  const int exponent = std::isinf(value) ? 200 : std::max(std::ilogb(value), least);
  const double step = std::ldexp(1, exponent - f.mantissa);
  const double rounded = std::isinf(value) ? value : std::nearbyint(value / step) * step;
  return std::abs(rounded) > f.largest ? std::copysign(f.largest, value) : rounded;
}

bool Same(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

TEST(Convert, EveryNumberHasItsValueAndComesBack) {
  for (const auto& [dtype, format] : kFloats) {
    WithNumber(dtype, [&, f = format](auto number) {
      using Number = decltype(number);
      for (uint32_t bits = 0; bits < 1U << (1 + f.exponent + f.mantissa); ++bits) {
        const float value = Number::ToFloat(static_cast<typename Number::Bits>(bits));
        ASSERT_TRUE(Same(value, Value(f, bits))) << bits;
        if (std::isfinite(value)) {
          ASSERT_EQ(Number::FromFloat(value), bits);
        }
      }
    });
  }
}

// Every number of every format, the middles between neighbours, and the floats beside them.
std::vector<float> Interesting() {
  std::vector<float> values;
  const auto add = [&](float value) {
    for (const float v :
         {value, std::nextafter(value, HUGE_VALF), std::nextafter(value, -HUGE_VALF)}) {
      values.push_back(v);
      values.push_back(-v);
    }
  };
  for (const auto& [dtype, f] : kFloats) {
    for (uint32_t bits = 0; bits<1U << (f.exponent + f.mantissa); bits += f.mantissa> 4 ? 3 : 1) {
      const double value = Value(f, bits);
      const double above = Value(f, bits + 1);
      if (!std::isfinite(value) || !std::isfinite(above)) continue;
      add(static_cast<float>(value));
      add(static_cast<float>((value + above) / 2));
    }
  }
  for (int i = 0; i < 300; ++i) add(static_cast<float>(i) / 2);
  for (const float v : {65519.0F, 65520.0F, 463.9F, 464.0F, 61440.0F, 1e30F, 3.4e38F, HUGE_VALF,
                        1e-45F, 0.0F, std::nanf("")}) {
    add(v);
  }
  return values;
}

TEST(Convert, RoundsToTheNearestAndSaturates) {
  for (const float value : Interesting()) {
    for (const auto& [dtype, format] : kFloats) {
      WithNumber(dtype, [&, f = format, name = DTypeName(dtype)](auto number) {
        using Number = decltype(number);
        const float got = Number::ToFloat(Number::FromFloat(value));
        ASSERT_TRUE(Same(got, Nearest(f, value)) || (std::isnan(got) && std::isnan(value)))
            << name << " of " << value << " is " << got;
      });
    }
    const double clamped = std::clamp(static_cast<double>(value), -128.0, 127.0);
    ASSERT_EQ(Int8::ToFloat(Int8::FromFloat(value)),
              std::isnan(value) ? 0 : std::nearbyint(clamped));
  }
}

template <typename T>
std::vector<std::byte> Bytes(const std::vector<T>& values) {
  const auto* data = reinterpret_cast<const std::byte*>(values.data());
  return {data, data + values.size() * sizeof(T)};
}

// Bit by bit, but for NaNs.
void ExpectSame(DType dtype, const std::byte* want, const std::byte* got, uint64_t count) {
  WithNumber(dtype, [&](auto number) {
    using Number = decltype(number);
    for (uint64_t i = 0; i < count; ++i) {
      typename Number::Bits a, b;
      std::memcpy(&a, want + i * sizeof(a), sizeof(a));
      std::memcpy(&b, got + i * sizeof(b), sizeof(b));
      const bool nans = std::isnan(Number::ToFloat(a)) && std::isnan(Number::ToFloat(b));
      ASSERT_TRUE(a == b || nans) << "number " << i << ": " << +b << ", not " << +a;
    }
  });
}

// What the executor uses, on every instruction set that this machine has, against one at a time.
TEST(Convert, RunsOfAnyLengthAreTheSameAsOneAtATime) {
  const uint64_t seed = TestSeed();
  Random random(seed);
  for (const DType from : kAll) {
    std::vector<std::byte> source;
    if (from == DType::kFp32) source = Bytes(Interesting());
    const size_t numbers = SizeOf(from) == 1 ? 256 : 65536;
    if (SizeOf(from) == 1) {
      for (size_t i = 0; i < numbers; ++i) source.push_back(static_cast<std::byte>(i));
    } else if (SizeOf(from) == 2) {
      std::vector<uint16_t> all(numbers);
      for (size_t i = 0; i < numbers; ++i) all[i] = static_cast<uint16_t>(i);
      source = Bytes(all);
    }
    const uint64_t count = source.size() / SizeOf(from);
    for (const DType to : kAll) {
      for (const ConvertIsa isa : ConvertIsas()) {
        for (const float factor : {1.0F, 0.3F, 1e-6F, 3e20F}) {
          SCOPED_TRACE(testing::Message() << DTypeName(from) << " to " << DTypeName(to) << " x "
                                          << factor << ", " << isa.name);
          std::vector<std::byte> want(count * SizeOf(to));
          std::vector<std::byte> got(want.size());
          ConvertRun(from, source.data(), to, want.data(), count, factor);
          ConvertFn convert = isa.function(from, to);
          convert(source.data(), got.data(), count, factor);
          ExpectSame(to, want.data(), got.data(), count);
          if (HasFatalFailure()) return;
          // Any length, and not a byte beyond.
          for (uint64_t length = 0; length < std::min<uint64_t>(count, 150); ++length) {
            const uint64_t first = random() % (count - length);
            std::vector<std::byte> part(length * SizeOf(to) + 1, std::byte{0x5a});
            convert(source.data() + first * SizeOf(from), part.data(), length, factor);
            ASSERT_EQ(part.back(), std::byte{0x5a});
            ExpectSame(to, want.data() + first * SizeOf(to), part.data(), length);
            if (HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace kvrelay
