# kvrelay_precompile(<target> <kind>): what nearly every source of such targets includes is parsed once, for all targets of
# the kind: library, tools (a library with JSON), program, test, story (a test with JSON). Sources include what they use
# all the same. Targets of a kind are compiled alike: a compiler refuses what was precompiled at another optimisation, or for
# an executable, where it makes a library. Benchmark programs, each a source of its own, take none.
#
# For builds from nothing. A compiler cache does better without.

if(KVRELAY_CCACHE)
  set(KVRELAY_PRECOMPILE_DEFAULT OFF)
else()
  set(KVRELAY_PRECOMPILE_DEFAULT ON)
endif()
option(KVRELAY_PRECOMPILE "Precompile headers" ${KVRELAY_PRECOMPILE_DEFAULT})

set(KVRELAY_PRECOMPILED_library algorithm chrono functional map memory optional span string thread unordered_map vector
                                tl/expected.hpp)
set(KVRELAY_PRECOMPILED_tools ${KVRELAY_PRECOMPILED_library} nlohmann/json.hpp)
set(KVRELAY_PRECOMPILED_program ${KVRELAY_PRECOMPILED_tools})
set(KVRELAY_PRECOMPILED_test ${KVRELAY_PRECOMPILED_library} gmock/gmock.h gtest/gtest.h)
set(KVRELAY_PRECOMPILED_story ${KVRELAY_PRECOMPILED_test} nlohmann/json.hpp)

function(kvrelay_precompile target kind)
  if(NOT KVRELAY_PRECOMPILE)
    return()
  endif()
  get_property(first GLOBAL PROPERTY KVRELAY_FIRST_${kind})
  if(first)
    target_precompile_headers(${target} REUSE_FROM ${first})
    return()
  endif()
  set_property(GLOBAL PROPERTY KVRELAY_FIRST_${kind} ${target})
  foreach(header IN LISTS KVRELAY_PRECOMPILED_${kind})
    target_precompile_headers(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:<${header}$<ANGLE-R>>")
  endforeach()
endfunction()
