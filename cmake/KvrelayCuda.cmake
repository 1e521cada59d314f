# CUDA: detected and reported. The CUDA backends arrive behind headers that compile without it.
# Sets KVRELAY_CUDA_VERSION: the toolkit's, or "off".

set(KVRELAY_CUDA_VERSION "off")
if(NOT KVRELAY_CUDA STREQUAL "OFF")
  find_package(CUDAToolkit QUIET)
  if(CUDAToolkit_FOUND)
    set(KVRELAY_CUDA_VERSION "${CUDAToolkit_VERSION}")
  elseif(KVRELAY_CUDA STREQUAL "ON")
    message(FATAL_ERROR "KVRELAY_CUDA=ON, but no CUDA toolkit was found")
  endif()
endif()
