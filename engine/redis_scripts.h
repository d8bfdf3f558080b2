/* redis_scripts.h - what is done within Redis, where nobody comes between.
 *
 * Each has one key, the prefix of all, and may be run twice with the same arguments.
 */
#ifndef LATTE_ENGINE_REDIS_SCRIPTS_H
#define LATTE_ENGINE_REDIS_SCRIPTS_H

/* drop: a session does not need a state any more. each: of a row of names. remove: a session. */
#define SCRIPT_HELPERS                                                                             \
    "local p = KEYS[1]\n"                                                                          \
    "local function drop(name, id)\n"                                                              \
    "  redis.call('SREM', p..'r:'..name, id)\n"                                                    \
    "  if redis.call('EXISTS', p..'r:'..name) == 0 then\n"                                         \
    "    redis.call('UNLINK', p..'o:'..name, p..'i:'..name)\n"                                     \
    "  end\n"                                                                                      \
    "end\n"                                                                                        \
    "local function each(names)\n"                                                                 \
    "  return string.gmatch(names or '', string.rep('%x', 32))\n"                                  \
    "end\n"                                                                                        \
    "local function remove(id)\n"                                                                  \
    "  local s = redis.call('HMGET', p..'s:'..id, 'names', 'owner')\n"                             \
    "  for name in each(s[1]) do drop(name, id) end\n"                                             \
    "  redis.call('UNLINK', p..'s:'..id, p..'l:'..id)\n"                                           \
    "  redis.call('ZREM', p..'u:'..(s[2] or ''), id)\n"                                            \
    "  redis.call('ZREM', p..'all', id)\n"                                                         \
    "  redis.call('ZREM', p..'e', id)\n"                                                           \
    "end\n"

/* id, known revision, owner ('' any), lease ('' none), its ms: the session as it is. */
static const char script_fetch[] =
    "local p, id = KEYS[1], ARGV[1]\n"
    "local s = redis.call('HMGET', p..'s:'..id, 'rev', 'owner', 'record', 'names')\n"
    "if not s[1] or (ARGV[3] ~= '' and s[2] ~= ARGV[3]) then return {'NONE'} end\n"
    "local lease = redis.call('GET', p..'l:'..id)\n"
    "if ARGV[4] ~= '' then\n"
    "  if lease and lease ~= ARGV[4] then return {'TURN'} end\n"
    "  redis.call('SET', p..'l:'..id, ARGV[4], 'PX', ARGV[5])\n"
    "end\n"
    "local out = {'SAME', s[1], lease and 1 or 0}\n"
    "if s[1] == ARGV[2] then return out end\n"
    "out[1] = 'OK'\n"
    "out[4] = s[3]\n"
    "for name in string.gmatch(s[4], string.rep('%x', 32)) do\n"
    "  out[#out + 1] = name\n"
    "  local head = redis.call('GETRANGE', p..'i:'..name, 0, 55)\n"
    "  out[#out + 1] = head\n"
    "  out[#out + 1] = head == '' and redis.call('GET', p..'o:'..name) or ''\n"
    "end\n"
    "return out\n";

/* id, expected, revision, lease, owner, expires, record, names, most sessions, most of an owner,
 * name of the new state or '', its origin. */
static const char script_put[] = SCRIPT_HELPERS
    "local id, expected, revision, lease, owner = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]\n"
    "local key = p..'s:'..id\n"
    "local s = redis.call('HMGET', key, 'rev', 'past', 'names')\n"
    "local past = s[2] or ''\n"
    "if string.find(past, revision, 1, true) then return {'OK'} end\n"
    "local held = redis.call('GET', p..'l:'..id)\n"
    "if lease ~= '' and held ~= lease then return {'LATE'} end\n"
    "if lease == '' and held then return {'TURN'} end\n"
    "if expected == '' then\n"
    "  if s[1] then return {'CHANGED'} end\n"
    "  local n = redis.call('ZCARD', p..'all')\n"
    "  if n >= tonumber(ARGV[9]) and ARGV[9] ~= '0' then return {'FULL', tostring(n)} end\n"
    "  n = redis.call('ZCARD', p..'u:'..owner)\n"
    "  if n >= tonumber(ARGV[10]) and ARGV[10] ~= '0' then return {'QUOTA', tostring(n)} end\n"
    "else\n"
    "  if not s[1] then return {'NONE'} end\n"
    "  if s[1] ~= expected then return {'CHANGED'} end\n"
    "end\n"
    "for name in each(ARGV[8]) do\n"
    "  if name ~= ARGV[11] and redis.call('EXISTS', p..'o:'..name, p..'i:'..name) == 0 then\n"
    "    return {'LACKS', name}\n"
    "  end\n"
    "end\n"
    "if ARGV[11] ~= '' then redis.call('SET', p..'o:'..ARGV[11], ARGV[12]) end\n"
    "local wanted = {}\n"
    "for name in each(ARGV[8]) do\n"
    "  wanted[name] = true\n"
    "  redis.call('SADD', p..'r:'..name, id)\n"
    "  redis.call('PERSIST', p..'i:'..name)\n"
    "end\n"
    "for name in each(s[3]) do\n"
    "  if not wanted[name] then drop(name, id) end\n"
    "end\n"
    "redis.call('HSET', key, 'rev', revision, 'past', revision..string.sub(past, 1, 224),\n"
    "  'owner', owner, 'record', ARGV[7], 'names', ARGV[8])\n"
    "if expected == '' then\n"
    "  local n = redis.call('INCR', p..'n')\n"
    "  redis.call('ZADD', p..'u:'..owner, n, id)\n"
    "  redis.call('ZADD', p..'all', n, id)\n"
    "end\n"
    "if ARGV[6] ~= '0' then redis.call('ZADD', p..'e', ARGV[6], id)\n"
    "else redis.call('ZREM', p..'e', id) end\n"
    "if lease ~= '' then redis.call('DEL', p..'l:'..id) end\n"
    "return {'OK'}\n";

/* id, expected ('' any) */
static const char script_delete[] =
    SCRIPT_HELPERS "local rev = redis.call('HGET', p..'s:'..ARGV[1], 'rev')\n"
                   "if redis.call('EXISTS', p..'l:'..ARGV[1]) == 1 then return {'TURN'} end\n"
                   "if not rev then return {'OK'} end\n"
                   "if ARGV[2] ~= '' and rev ~= ARGV[2] then return {'CHANGED'} end\n"
                   "remove(ARGV[1])\n"
                   "return {'OK'}\n";

/* How many at most: those overdue, unless they are in a turn. */
static const char script_expire[] = SCRIPT_HELPERS
    "local n = 0\n"
    "local ids = redis.call('ZRANGEBYSCORE', p..'e', '-inf', redis.call('TIME')[1], 'LIMIT', 0, "
    "ARGV[1])\n"
    "for _, id in ipairs(ids) do\n"
    "  if redis.call('EXISTS', p..'l:'..id) == 0 then\n"
    "    remove(id)\n"
    "    n = n + 1\n"
    "  end\n"
    "end\n"
    "return n\n";

/* id, lease, ms: renew it, or with 0 give it back. */
static const char script_lease[] = "local l = KEYS[1]..'l:'..ARGV[1]\n"
                                   "if redis.call('GET', l) ~= ARGV[2] then return 0 end\n"
                                   "if ARGV[3] == '0' then return redis.call('DEL', l) end\n"
                                   "return redis.call('PEXPIRE', l, ARGV[3])\n";

/* name, the key that has its bytes, ms that it is kept although no session needs it. */
static const char script_place[] =
    "local p, i = KEYS[1], KEYS[1]..'i:'..ARGV[1]\n"
    "local needed = redis.call('EXISTS', p..'r:'..ARGV[1]) == 1\n"
    "if redis.call('EXISTS', ARGV[2]) == 0 then return redis.call('EXISTS', i) end\n"
    "if not needed and ARGV[3] == '0' then\n"
    "  redis.call('UNLINK', ARGV[2])\n"
    "  return 0\n"
    "end\n"
    "redis.call('RENAME', ARGV[2], i)\n"
    "if needed then redis.call('PERSIST', i) else redis.call('PEXPIRE', i, ARGV[3]) end\n"
    "return 1\n";

/* owner, after ('' from the first), how many. */
static const char script_list[] =
    "local u, max = KEYS[1]..'u:'..ARGV[1], '+inf'\n"
    "if ARGV[2] ~= '' then\n"
    "  max = redis.call('ZSCORE', u, ARGV[2])\n"
    "  if not max then return 0 end\n"
    "  max = '('..max\n"
    "end\n"
    "return redis.call('ZREVRANGEBYSCORE', u, max, '-inf', 'LIMIT', 0, ARGV[3])\n";

#endif
