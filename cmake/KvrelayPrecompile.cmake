# kvrelay_precompile(<target> [<header>...]): what nearly every source of the target includes, and these headers of other
# libraries (written without brackets), are parsed once for all its sources. Sources include what they use all the same.
#
# For builds from nothing. A compiler cache does better without.

if(KVRELAY_CCACHE)
  set(KVRELAY_PRECOMPILE_DEFAULT OFF)
else()
  set(KVRELAY_PRECOMPILE_DEFAULT ON)
endif()
option(KVRELAY_PRECOMPILE "Precompile headers" ${KVRELAY_PRECOMPILE_DEFAULT})

function(kvrelay_precompile target)
  if(NOT KVRELAY_PRECOMPILE)
    return()
  endif()
  foreach(header IN ITEMS algorithm chrono functional map memory optional span string thread unordered_map vector
                          tl/expected.hpp LISTS ARGN)
    target_precompile_headers(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:<${header}$<ANGLE-R>>")
  endforeach()
endfunction()
