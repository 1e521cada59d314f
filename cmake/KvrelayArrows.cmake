# Which folders a folder may include and link: the picture in ARCHITECTURE as data. kvrelay_library() refuses other
# links, tests/arrows_test.cmake refuses other includes.
#
#   base <- kvcache <- {proto, transport} <- agent <- engine <- tools
#           kvcache <- attention                    <- engine

set(KVRELAY_FOLDERS base kvcache proto transport attention agent engine tools)

set(KVRELAY_MAY_USE_base)
set(KVRELAY_MAY_USE_kvcache base)
set(KVRELAY_MAY_USE_proto base kvcache)
set(KVRELAY_MAY_USE_transport base kvcache)
set(KVRELAY_MAY_USE_attention base kvcache)
set(KVRELAY_MAY_USE_agent base kvcache proto transport)
set(KVRELAY_MAY_USE_engine base kvcache proto transport attention agent)
set(KVRELAY_MAY_USE_tools base kvcache proto transport attention agent engine)

# kvcache/ holds two targets. These sources, and their headers, allocate, export and copy memory (kvcache_memory);
# everything else there is pure values (kvcache) and must not include them.
set(KVRELAY_KVCACHE_MEMORY_SOURCES device*.cc memfd*.cc region*.cc copy_host*.cc *_memory.cc)
