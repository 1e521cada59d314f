# CUDA: detected and reported. The CUDA backends arrive behind headers that compile without it.
# Sets KVRELAY_CUDA_VERSION: the toolkit's, or "off, <why>"; and KVRELAY_CUDA_ON.
#
# kvrelay_cuda_kernels(<target> [PORTABLE [<glob>...]]): how the target's .cu files are compiled. Hopper's own instructions
# are for sm_90a alone. PORTABLE sources use none and also come as PTX that any device from compute capability 8.0 on
# compiles; those that globs name have Hopper's code made from that PTX, which spares a second pass of the compiler.
# CUDA_FORCE_PTX_JIT=1 makes a Hopper machine compile the PTX, too.

set(KVRELAY_CUDA_ON OFF)
set(KVRELAY_CUDA_VERSION "off")
if(KVRELAY_CUDA STREQUAL "AUTO" AND KVRELAY_SANITIZE)
  set(KVRELAY_CUDA_VERSION "off, sanitizer build")
elseif(NOT KVRELAY_CUDA STREQUAL "OFF")
  find_package(CUDAToolkit 12.5 QUIET)
  if(CUDAToolkit_FOUND AND CUDAToolkit_NVCC_EXECUTABLE)
    set(CMAKE_CUDA_ARCHITECTURES OFF)  # said by kvrelay_cuda_kernels
    if(NOT CMAKE_CUDA_COMPILER)
      set(CMAKE_CUDA_COMPILER "${CUDAToolkit_NVCC_EXECUTABLE}")
    endif()
    if(CMAKE_CXX_COMPILER_LAUNCHER)
      set(CMAKE_CUDA_COMPILER_LAUNCHER "${CMAKE_CXX_COMPILER_LAUNCHER}")
    endif()
    enable_language(CUDA)
    if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 does not know that nvcc has it
      set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
      set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
    endif()
    set(KVRELAY_CUDA_ON ON)
    set(KVRELAY_CUDA_VERSION "${CUDAToolkit_VERSION}")
    add_compile_options("$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall>")
    if(KVRELAY_WERROR)
      add_compile_options("$<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings>")
    endif()
  elseif(KVRELAY_CUDA STREQUAL "ON")
    message(FATAL_ERROR "KVRELAY_CUDA=ON, but no CUDA toolkit from 12.5 on was found")
  else()
    set(KVRELAY_CUDA_VERSION "off, no toolkit from 12.5 on")
  endif()
endif()

function(kvrelay_cuda_kernels target)
  cmake_parse_arguments(arg "" "" "PORTABLE" ${ARGN})
  set(hopper "-gencode=arch=compute_90a,code=sm_90a")
  set(ptx "-gencode=arch=compute_80,code=compute_80")
  if(arg_PORTABLE)
    kvrelay_glob(portable SOURCES ${arg_PORTABLE})
    kvrelay_glob(others SOURCES cuda/*.cu EXCLUDE ${arg_PORTABLE})
    set_property(SOURCE ${portable} APPEND PROPERTY COMPILE_OPTIONS "-gencode=arch=compute_80,code=sm_90" "${ptx}")
    set_property(SOURCE ${others} APPEND PROPERTY COMPILE_OPTIONS "${hopper}")
    set(options -lineinfo)
  elseif("PORTABLE" IN_LIST ARGN)
    set(options -lineinfo "${hopper}" "${ptx}")
  else()
    set(options -lineinfo "${hopper}")
  endif()
  target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:${options}>")
endfunction()
